"""The comparison that the quickstart of text ends with: an energy-based model beside its autoregressive twin.

From the evaluation of both come a table to print, `summary.json` and a picture, `thinking.png`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebwm_dist.data.loading.mixture import Mixture
from ebwm_dist.errors import UserError
from ebwm_dist.evaluation.pictures import draw_text
from ebwm_dist.evaluation.unigram import unigram_perplexity
from ebwm_dist.files import write_json
from ebwm_dist.inference.api import Predictor
from ebwm_dist.inference.images import of_images
from ebwm_dist.inference.settings import Sampling
from ebwm_dist.run import Run, ValidationData

TEXT_STEPS, VIDEO_STEPS = (1, 2, 3, 4, 8), (1, 2, 3, 4)
"""Numbers of MCMC steps that are compared."""
PROMPTS, PROMPT_TOKENS, GENERATED_TOKENS, TEMPERATURE = 3, 24, 48, 0.7


@dataclass(frozen=True)
class Pair:
    """Two finished runs on the same data."""

    run: Run
    twin: Run

    def __post_init__(self) -> None:
        """Refuse runs that are not finished, or have not seen the same."""
        twins = ("dit",) if of_images(self.run) else ("ar",) if self.unit == "tokens" else ("ar", "dit")
        for run, kinds in ((self.run, ("ebt",)), (self.twin, twins)):
            if (kind := run.config.model.kind) not in kinds:
                raise UserError(f"{run.name} has model.kind = {kind}, {' or '.join(kinds)} is compared in its place")
            if not any(record["kind"] == "train" for record in run.records):
                raise UserError(f"{run.name} has no metrics.jsonl of its training: name the run folder, no export")
            if run.step < run.config.training.max_steps:
                raise UserError(
                    f"{run.name} has done {run.step} of {run.config.training.max_steps} steps: run the command that "
                    "trains it again"
                )
        seen = [(Mixture.load(run.config.data), states(run)) for run in (self.run, self.twin)]
        (data, count), (other, other_count) = seen
        if (data.fingerprint, count) != (other.fingerprint, other_count):
            raise UserError(
                f"{self.run.name} saw {count:,} {self.unit} of {data.name}, {self.twin.name} {other_count:,} of "
                f"{other.name}: train both on the same"
            )

    @property
    def unit(self) -> str:
        """Return the name of a predicted state."""
        return "tokens" if self.run.config.model.embedding_dim is None else "frames"

    @property
    def steps(self) -> tuple[int, ...]:
        """Return the numbers of MCMC steps to compare."""
        usual = TEXT_STEPS if self.unit == "tokens" else VIDEO_STEPS
        return tuple(sorted({*usual, self.run.trained_steps}))


def tokens(run: Run) -> int:
    """Return the number of tokens trained on."""
    return int([record for record in run.records if record["kind"] == "train"][-1]["tokens"])


def states(run: Run) -> int:
    """Return the number of tokens of text trained on, or of frames, each of one token or more."""
    return tokens(run) // (1 if run.config.model.embedding_dim is None else run.config.model.block_size)


def seconds(run: Run) -> float:
    """Return the time spent in training steps."""
    before, total = 0, 0.0
    for record in run.records:
        if record["kind"] == "train":
            total += (record["tokens"] - before) / record["tokens_per_second"]
            before = record["tokens"]
    return total


def write_text_summary(
    pair: Pair, data: ValidationData, evaluation: dict[str, Any], evaluation_time: float, folder: Path
) -> list[Path]:
    """Print the table, and write summary and picture into `folder`; return their paths."""
    unigram = unigram_perplexity(data, data.samples)
    summary = text_summary(pair, evaluation, unigram)
    summary["seconds"] = seconds(pair.run) + seconds(pair.twin) + evaluation_time
    print(text_table(summary))
    print("\nHeld-out text continued by the EBT (after |):")
    for prompt, continuation in continued(pair.run, data):
        print("  " + f"{prompt}|{continuation}".replace("\n", " / "))
    print()
    files = [folder / "summary.json", folder / "thinking.png"]
    write_json(files[0], summary)
    draw_text(pair.run, pair.twin, evaluation, unigram, files[1])
    return files


def text_summary(pair: Pair, evaluation: dict[str, Any], unigram: float) -> dict[str, Any]:
    """Return the content of summary.json of text."""
    model, twin = evaluation["model"], evaluation["baseline"]
    by_steps = model["by_steps"]
    return {
        "ebt": {
            "val_perplexity_by_steps": {str(n): by_steps["perplexity"][n - 1] for n in pair.steps},
            "val_energy_by_steps": {str(n): by_steps["energy"][n] for n in (0, *pair.steps)},
            "val_loss_change_by_steps": {str(n): by_steps["change_from_first"][n - 1] for n in pair.steps},
            "trained_steps": pair.run.trained_steps,
            "parameters": model["model"]["parameters"],
            "tokens": tokens(pair.run),
        },
        "ar": {
            "val_perplexity": twin["by_steps"]["perplexity"][0],
            "parameters": twin["model"]["parameters"],
            "tokens": tokens(pair.twin),
        },
        "unigram_perplexity": unigram,
        "val_tokens": by_steps["tokens"],
    }


def text_table(summary: dict[str, Any]) -> str:
    """Return a summary of text as a table."""
    ebt, ar, unigram = summary["ebt"], summary["ar"], summary["unigram_perplexity"]
    perplexities, trained = ebt["val_perplexity_by_steps"], str(ebt["trained_steps"])
    lines = ["", f"Held-out perplexity over {summary['val_tokens']:,} tokens"]
    lines.append(f"  unigram model                       {unigram:8.1f}")
    for steps, perplexity in perplexities.items():
        plural, note = "s" if steps != "1" else " ", "  (trained)" if steps == trained else ""
        energy = ebt["val_energy_by_steps"][steps]
        lines.append(
            f"  EBT, {steps} MCMC step{plural}                  {perplexity:8.1f}   energy {energy:8.3f}{note}"
        )
    lines.append(f"  autoregressive twin                 {ar['val_perplexity']:8.1f}")
    best = min(perplexities, key=perplexities.__getitem__)
    change, error = ebt["val_loss_change_by_steps"][best]
    if best == "1" or -change < 2 * error:
        lines.append("Thinking longer than one step makes no measurable difference for the better here.")
    else:
        less = f"{-100 * math.expm1(change):.1f} % (+- {100 * error:.1f})"
        lines.append(f"Thinking longer helps: after {best} steps the perplexity is {less} lower than after 1.")
    share = 100 * perplexities[trained] / unigram
    lines.append(f"At the trained {trained} steps the EBT is at {share:.1f} % of the unigram perplexity.")
    return "\n".join(lines)


def continued(run: Run, data: ValidationData) -> list[tuple[str, str]]:
    """Return some beginnings of held-out sequences, each with the continuation by the model."""
    assert run.tokenizer is not None
    prompts = [batch.observed[0, :PROMPT_TOKENS].tolist() for batch in data.batches(1, PROMPTS)][:PROMPTS]
    texts = Predictor(run.model, run.config, run.tokenizer).generate(
        prompts, GENERATED_TOKENS, sampling=Sampling(TEMPERATURE), seeds=range(len(prompts)), slide=True
    )
    # They may begin and end within a character; what is left of it at the end goes on in the continuation.
    shown = [run.tokenizer.decode(prompt, complete=True).lstrip("\ufffd") for prompt in prompts]
    return [(prompt, text.text) for prompt, text in zip(shown, texts, strict=True)]
