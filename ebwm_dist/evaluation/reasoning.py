"""The summary of runs whose answers have a difficulty: accuracy by difficulty and MCMC steps, beside the twins.

From the evaluations come a table and a train of thought to print, `summary.json` and a picture, `reasoning.png`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ebwm_dist.data.format.reader import ShardReader
from ebwm_dist.data.format.sample_format import FIRST_DIFFICULTY, TokenFormat
from ebwm_dist.data.loading.mixture import Mixture
from ebwm_dist.data.tokenizer import Tokenizer
from ebwm_dist.errors import UserError
from ebwm_dist.evaluation.reasoning_picture import amount, draw_reasoning
from ebwm_dist.evaluation.summary import Pair, seconds, tokens
from ebwm_dist.files import write_json
from ebwm_dist.run import Run, ValidationData

STEPS = 16
"""The EBT is measured at every number of MCMC steps up to this one, or up to that of training."""
_BATCH_SIZE = 64


@dataclass(frozen=True)
class Reasoning:
    """A finished run, its twins on the same data, and the held-out data that they are compared on."""

    run: Run
    twins: dict[int, Run]
    """By their number of layers."""
    data: ValidationData

    @staticmethod
    def of(pairs: list[Pair], data: ValidationData) -> Reasoning:
        """Compare the pairs, which have the same run and twins of different depths."""
        twins = {pair.twin.config.model.num_layers: pair.twin for pair in pairs}
        if len(twins) < len(pairs):
            raise UserError("--baseline: two twins have the same number of layers; name twins of different depths")
        return Reasoning(pairs[0].run, dict(sorted(twins.items())), data)

    @property
    def steps(self) -> range:
        """Return the numbers of MCMC steps to measure."""
        return range(1, max(STEPS, self.run.trained_steps) + 1)

    @property
    def task(self) -> str:
        """Return the first word in the name of the file that the held-out data were made of: its generator."""
        name = self.data.mixture.manifest.source.get("inputs", [{}])[0].get("name", "")
        found = re.match(r"[A-Za-z]+", Path(name).name)
        return found[0] if found else "answers"

    def write(
        self, model: dict[str, Any], twins: list[dict[str, Any]], evaluation_time: float, folder: Path
    ) -> list[Path]:
        """Print table and train of thought, write summary and picture into `folder`, and return their paths."""
        spent = evaluation_time + sum(map(seconds, (self.run, *self.twins.values())))
        summary = self.summary(model, twins) | {"seconds": spent}
        thought = self.thought(model["by_difficulty"]["example"])
        print(reasoning_table(summary))
        print(thought_lines(thought))
        print()
        files = [folder / "summary.json", folder / "reasoning.png"]
        write_json(files[0], summary)
        draw_reasoning(summary, model["by_difficulty"], thought, unit(summary), files[1])
        return files

    def summary(self, model: dict[str, Any], twins: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the content of summary.json from the measurements of the run and of its twins."""
        found = model["by_difficulty"]
        levels = list(map(str, found["difficulties"]))
        stopped = found["stopped"][0]
        return {
            "task": self.task,
            "trained": {"max_hops": max_trained_difficulty(self.run), "max_steps": self.run.trained_steps},
            "answers": dict(zip(levels, found["answers"], strict=True)),
            "ebt": {
                "parameters": model["model"]["parameters"],
                "tokens": tokens(self.run),
                "accuracy": {
                    level: {str(n): accuracy for n, (accuracy, _) in zip(found["steps"], row, strict=True)}
                    for level, row in zip(levels, found["accuracy"], strict=True)
                },
                "stopped": {
                    "prediction_tolerance": stopped["prediction_tolerance"],
                    "accuracy": {n: value for n, (value, _) in zip(levels, stopped["accuracy"], strict=True)},
                    "steps": {n: value for n, (value, _) in zip(levels, stopped["steps"], strict=True)},
                    "correlation": stopped["correlation"],
                },
                "auroc_by_steps": {str(n): value for n, value in zip(found["steps"], found["auroc"], strict=True)},
                "auroc_of_surprisal_by_steps": dict(
                    zip(map(str, found["steps"]), found["auroc_of_surprisal"], strict=True)
                ),
            },
            "twins": {
                str(layers): {
                    "parameters": twin["model"]["parameters"],
                    "accuracy": {
                        n: row[0][0] for n, row in zip(levels, twin["by_difficulty"]["accuracy"], strict=True)
                    },
                }
                for layers, twin in zip(self.twins, twins, strict=True)
            },
        }

    def thought(self, example: dict[str, Any]) -> dict[str, Any]:
        """Return an example of `difficulty.example` as text: the prompt, the answer, and what each step predicts.

        It ends one step after the last change.
        """
        tokenizer = self.run.tokenizer
        assert tokenizer is not None
        batches = list(self.data.batches(_BATCH_SIZE, self.data.samples))
        ids = torch.cat([batch.sample_ids[batch.sample_mask] for batch in batches])
        samples = torch.cat([batch.observed[batch.sample_mask] for batch in batches])
        sample = samples[ids.argsort(stable=True)[example["sequence"]]].tolist()
        start = example["position"] + 1  # targets are one token ahead
        begin = max((place + 1 for place in range(start) if sample[place] == tokenizer.eos_id), default=0)
        predicted = example["predicted"]
        answer = sample[start : start + len(predicted[0])]
        end = 2 + max((i for i in range(1, len(predicted)) if predicted[i] != predicted[i - 1]), default=0)
        return {
            "prompt": _text(tokenizer, sample[begin:start]),
            "answer": _text(tokenizer, answer),
            "difficulty": example["difficulty"],
            "steps": example["steps"][:end],
            "predicted": [_text(tokenizer, ids) for ids in predicted[:end]],
            "energies": example["energies"][:end],
        }


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return tokens as text on one line, or by their numbers where they have none that can be shown."""
    text = " ".join(tokenizer.decode(ids).split())
    shown = text and text.isprintable() and "\ufffd" not in text  # which stands for a part of a character
    return text if shown else " ".join(f"#{number}" for number in ids)


def max_trained_difficulty(run: Run) -> int | None:
    """Return the largest difficulty in the data that a run was trained on; None if they have none."""
    largest = -1
    for source in Mixture.load(run.config.data).sources:
        if isinstance(source.manifest.sample_format, TokenFormat) and source.manifest.sample_format.labels:
            for block in ShardReader(source.manifest, "train").blocks():
                largest = max(largest, int(block[:, 1].max()) - FIRST_DIFFICULTY)
    return None if largest < 0 else largest


def unit(summary: dict[str, Any]) -> str:
    """Return the name of the difficulties of a task."""
    return "hops" if summary["task"] == "pointers" else "difficulty"


def reasoning_table(summary: dict[str, Any]) -> str:
    """Return a summary as a table, with a column for each difficulty."""
    ebt, trained, levels = summary["ebt"], summary["trained"], list(summary["answers"])
    numbers = [int(number) for number in ebt["accuracy"][levels[0]]]
    shown = sorted({n for n in numbers if n & (n - 1) == 0} | {trained["max_steps"], numbers[-1]})

    def line(name: str, cells: list[str]) -> str:
        return f"  {name:34}" + "".join(f"{cell:>7}" for cell in cells)

    def percent(row: dict[str, float]) -> list[str]:
        return [f"{100 * row[level]:.1f}" for level in levels]

    lines = [
        "",
        f"Accuracy (%) of {sum(summary['answers'].values()):,} held-out answers by {unit(summary)}; trained on at most "
        f"{amount(trained['max_hops'], unit(summary))} and {trained['max_steps']} MCMC steps",
        line(unit(summary), levels),
    ]
    for number in shown:
        accuracies = {level: row[str(number)] for level, row in ebt["accuracy"].items()}
        note = " (trained)" if number == trained["max_steps"] else ""
        lines.append(line(f"EBT, {number} step{'s' * (number != 1)}{note}", percent(accuracies)))
    lines.append(line("EBT, stops by itself", percent(ebt["stopped"]["accuracy"])))
    lines.append(line("     after steps (mean)", [f"{ebt['stopped']['steps'][level]:.1f}" for level in levels]))
    for layers, twin in summary["twins"].items():
        name = f"autoregressive twin, {layers} layer{'s' * (layers != '1')}"
        lines.append(line(name, percent(twin["accuracy"])))
    tolerance = ebt["stopped"]["prediction_tolerance"]
    lines.append(
        f"It stops when no probability changes by more than {tolerance:g}; its steps have a correlation of "
        f"{ebt['stopped']['correlation']:.2f} with {unit(summary)}."
    )
    return "\n".join(lines)


def thought_lines(thought: dict[str, Any]) -> str:
    """Return a train of thought in lines."""
    lines = ["", f"A train of thought of the EBT (the answer is {thought['answer']}): {thought['prompt'][-160:]}"]
    for step, predicted, energy in zip(thought["steps"], thought["predicted"], thought["energies"], strict=True):
        lines.append(f"  {f'step {step}' if step else 'start':8} {predicted:12} energy {energy:9.3f}")
    return "\n".join(lines)
