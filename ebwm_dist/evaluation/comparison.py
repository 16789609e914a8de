"""An energy-based model beside its autoregressive twin: does it predict better when it thinks longer?"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ebwm_dist.config.schema import Config
from ebwm_dist.data.tokenizer import Tokenizer
from ebwm_dist.devices import use_cuda
from ebwm_dist.errors import UserError
from ebwm_dist.evaluation.perplexity import Result, evaluate
from ebwm_dist.evaluation.unigram import unigram_perplexity
from ebwm_dist.files import write_json
from ebwm_dist.inference.generate import generate
from ebwm_dist.inference.sampling import Sampling
from ebwm_dist.mcmc.build import Model
from ebwm_dist.run import Run, ValidationData

THINKING_STEPS = (1, 2, 3, 4, 8)
BATCH_SIZE = 32
PROMPT_TOKENS, GENERATED_TOKENS, TEMPERATURE = 24, 48, 0.7


@dataclass(frozen=True)
class Finished:
    """A run and what its metrics tell."""

    folder: Path
    model: Model
    config: Config
    tokenizer: Tokenizer
    data: ValidationData
    records: list[dict[str, Any]]

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> Finished:
        """Read the newest checkpoint and the metrics of `folder`."""
        run = Run(folder, device)
        if run.tokenizer is None:
            raise UserError(f"{folder} was trained on video: use launchers/video_report.py")
        if not run.records:
            raise UserError(f"{folder} has no metrics.jsonl: name the run folder instead of an export")
        return cls(folder, run.model, run.config, run.tokenizer, run.validation_data(), run.records)

    @property
    def parameters(self) -> int:
        """Return the number of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    def train_records(self) -> list[dict[str, Any]]:
        """Return the records of training steps."""
        return [record for record in self.records if record["kind"] == "train"]

    @property
    def tokens(self) -> int:
        """Return the number of tokens trained on."""
        return self.train_records()[-1]["tokens"]

    @property
    def seconds(self) -> float:
        """Return the time spent in training steps."""
        before, total = 0, 0.0
        for record in self.train_records():
            total += (record["tokens"] - before) / record["tokens_per_second"]
            before = record["tokens"]
        return total

    def evaluate(self, num_steps: int, device: torch.device) -> Result:
        """Evaluate the whole held-out split at 1 to `num_steps` MCMC steps."""
        batches = self.data.batches(BATCH_SIZE, self.data.samples)
        name = f"evaluate {self.config.model.kind}"
        result = evaluate(self.model, tqdm(batches, name, unit="batch", disable=None, leave=False), num_steps, device)
        assert result is not None
        return result

    def sample(self, num_texts: int) -> list[tuple[str, str]]:
        """Return (held-out prompt, generated continuation) pairs."""
        batches = self.data.batches(1, num_texts)
        texts = []
        for number, batch in enumerate(islice(batches, num_texts)):
            prompt = batch.observed[0, :PROMPT_TOKENS].tolist()
            (continuation,) = generate(
                self.model,
                self.tokenizer,
                [prompt],
                num_tokens=GENERATED_TOKENS,
                max_context=self.config.data.sequence_length,
                sampling=Sampling(temperature=TEMPERATURE),
                seeds=[number],
                slide=True,
            )
            texts.append((self.tokenizer.decode(prompt), continuation.text))
        return texts


def compare(ebt_folder: Path, ar_folder: Path) -> dict[str, Any]:
    """Evaluate both runs; print the comparison, write summary.json and thinking.png into `ebt_folder`."""
    started = time.perf_counter()
    device = torch.device("cuda" if use_cuda() else "cpu")
    ebt, ar = Finished.load(ebt_folder, device), Finished.load(ar_folder, device)
    check_comparable(ebt, ar)
    thinking, baseline = ebt.evaluate(max(THINKING_STEPS), device), ar.evaluate(1, device)
    unigram = unigram_perplexity(ebt.data.mixture.manifest)
    energies = thinking.energies or []
    summary = {
        "ebt": {
            "val_perplexity_by_steps": {str(n): thinking.perplexities[n - 1] for n in THINKING_STEPS},
            "val_energy_by_steps": {str(n): energies[n] for n in (0, *THINKING_STEPS)},
            "val_loss_change_by_steps": {
                str(n): [thinking.step_losses[n - 1] - thinking.step_losses[0], thinking.standard_errors[n - 1]]
                for n in THINKING_STEPS
            },
            "trained_steps": ebt.config.mcmc.num_steps,
            "parameters": ebt.parameters,
            "tokens": ebt.tokens,
        },
        "ar": {"val_perplexity": baseline.perplexities[0], "parameters": ar.parameters, "tokens": ar.tokens},
        "unigram_perplexity": unigram,
        "val_tokens": thinking.tokens,
        "seconds": ebt.seconds + ar.seconds + time.perf_counter() - started,
    }
    print(_table(summary))
    print("\nHeld-out text continued by the EBT (after |):")
    for prompt, continuation in ebt.sample(3):
        print("  " + f"{prompt}|{continuation}".replace("\n", " / "))
    plot(ebt, ar, thinking, baseline, unigram, ebt_folder / "thinking.png")
    write_json(ebt_folder / "summary.json", summary)
    print(f"\nsummary: {ebt_folder / 'summary.json'}, plots: {ebt_folder / 'thinking.png'}")
    return summary


def check_comparable(ebt: Finished, ar: Finished) -> None:
    """Refuse to compare runs that are not finished, or have not seen the same."""
    for run in (ebt, ar):
        step, last = run.train_records()[-1]["step"], run.config.training.max_steps
        if step < last:
            raise UserError(f"{run.folder} has done {step} of {last} steps: run the command that trains it again")
    if ebt.data.mixture.fingerprint != ar.data.mixture.fingerprint or ebt.tokens != ar.tokens:
        raise UserError(
            f"{ebt.folder} saw {ebt.tokens:,} tokens of {ebt.data.mixture.name}, {ar.folder} {ar.tokens:,} of "
            f"{ar.data.mixture.name}: train both on the same"
        )


def _table(summary: dict[str, Any]) -> str:
    ebt, ar, unigram = summary["ebt"], summary["ar"], summary["unigram_perplexity"]
    trained = ebt["trained_steps"]
    lines = [
        "",
        f"Held-out perplexity over {summary['val_tokens']:,} tokens",
        f"  unigram model                       {unigram:8.1f}",
    ]
    for steps, perplexity in ebt["val_perplexity_by_steps"].items():
        energy = ebt["val_energy_by_steps"][steps]
        note = "  (trained)" if int(steps) == trained else ""
        lines.append(
            f"  EBT, {steps} MCMC step{'s' if steps != '1' else ' '}                  {perplexity:8.1f}"
            f"   energy {energy:8.3f}{note}"
        )
    lines.append(f"  autoregressive twin                 {ar['val_perplexity']:8.1f}")
    best = min(ebt["val_perplexity_by_steps"], key=ebt["val_perplexity_by_steps"].__getitem__)
    change, error = ebt["val_loss_change_by_steps"][best]
    if best == "1" or -change < 2 * error:
        lines.append("Thinking longer than one step makes no measurable difference for the better here.")
    else:
        less = f"{-100 * math.expm1(change):.1f} % (+- {100 * error:.1f})"
        lines.append(f"Thinking longer helps: after {best} steps the perplexity is {less} lower than after 1.")
    at_trained = ebt["val_perplexity_by_steps"].get(str(trained))
    if at_trained is not None:
        share = 100 * at_trained / unigram
        lines.append(f"At the trained {trained} steps the EBT is at {share:.1f} % of the unigram perplexity.")
    return "\n".join(lines)


def plot(ebt: Finished, ar: Finished, thinking: Result, baseline: Result, unigram: float, path: Path) -> None:
    """Draw the loss curves of both runs, and perplexity and energy against the number of MCMC steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    curves, steps = figure.subplots(1, 2)
    for run, color in ((ebt, "tab:blue"), (ar, "tab:orange")):
        records = run.train_records()
        name = run.config.model.kind.upper()
        curves.plot(
            [r["tokens"] for r in records], [r["loss_last_step"] for r in records], color=color, alpha=0.3, linewidth=1
        )
        val = [r for r in run.records if r["kind"] == "val"]
        curves.plot(
            [r["tokens"] for r in val], [r["loss_last_step"] for r in val], "o-", color=color, label=f"{name}, held out"
        )
    curves.set(title="Loss of the last step (thin: training)", xlabel="tokens", ylabel="cross-entropy (nats)")
    losses = [r["loss_last_step"] for run in (ebt, ar) for r in run.records if r["kind"] == "val"]
    curves.set_ylim(top=1.15 * max(loss for loss in losses if loss is not None))
    curves.legend()

    count = len(thinking.perplexities)
    steps.plot(range(1, count + 1), thinking.perplexities, "o-", color="tab:blue", label="EBT")
    steps.axhline(baseline.perplexities[0], color="tab:orange", label="autoregressive twin")
    steps.axvline(ebt.config.mcmc.num_steps, color="gray", linestyle=":", label="trained number of steps")
    if unigram < 2 * max(thinking.perplexities):
        steps.axhline(unigram, color="gray", linestyle="--", label="unigram")
    steps.set(title="Thinking longer", xlabel="MCMC steps", ylabel="held-out perplexity")
    if thinking.energies is not None:
        energy = steps.twinx()
        energy.plot(range(count + 1), thinking.energies, ".--", color="tab:green", label="energy")
        energy.set_ylabel("mean energy", color="tab:green")
        steps.set_zorder(energy.get_zorder() + 1)  # so that the legend is on top
        steps.patch.set_visible(False)
    steps.legend()
    figure.savefig(path, dpi=120)
