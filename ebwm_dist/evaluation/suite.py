"""Everything that is measured of a trained model, as one dictionary that JSON can hold.

All figures are made of tables that are the same on every rank, or of sums over all ranks, so that they do not depend on
the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_dist.data.loading.stream import Batch
from ebwm_dist.distributed import World
from ebwm_dist.errors import UserError
from ebwm_dist.evaluation.frames import frame_errors
from ebwm_dist.evaluation.multiple_choice import accuracies, read_questions, score
from ebwm_dist.evaluation.perplexity import Result, evaluate
from ebwm_dist.evaluation.predictions import Batches, Table, row_batches, rows_of_tokens, shuffled, tabulate
from ebwm_dist.evaluation.uncertainty import auroc, pearson, reliability, risk_coverage, spearman
from ebwm_dist.inference.thinking import Thinking, has_noise
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.models.flops import prediction_flops, training_flops_per_token
from ebwm_dist.prepare.encoding import encode_text
from ebwm_dist.run import Run, ValidationData


@dataclass(frozen=True)
class Options:
    """What to measure, and on how much."""

    steps: Sequence[int] = (1, 2, 4, 8)
    """Numbers of MCMC steps; all are measured on the way to the largest."""
    candidates: Sequence[int] = (1, 4)
    """Numbers of candidates, each with the number of steps of training; a model without noise has but one."""
    energy_tolerances: Sequence[float] = (1e-2, 1e-1)
    """Thresholds of early stopping, each with the largest number of steps."""
    max_sequences: int = 512
    batch_size: int = 16
    questions: Path | None = None
    """JSON lines of questions whose choices are ranked."""
    other_text: str | None = None
    """Text that is not like the data, for the out-of-distribution test."""


class Suite:
    """The measurements of one model on held-out data."""

    def __init__(
        self, run: Run, data: ValidationData, options: Options, world: World, say: Callable[[str], None] = print
    ):
        self.trained, self.data, self.options, self.world, self.say = run, data, options, world, say
        self.model, self.config = run.model, run.config
        self.is_energy = self.config.model.kind == "ebt"
        self.trained_steps = self.config.mcmc.max_mcmc_steps if self.is_energy else 1
        self.tokens_per_byte = data.tokens_per_byte(options.max_sequences)
        self.batches: Batches = partial(
            data.batches, options.batch_size, options.max_sequences, world.rank, world.world_size
        )

    def run(self) -> dict[str, Any]:
        """Measure everything."""
        kind = self.config.model.kind
        result: dict[str, Any] = {"model": self.describe()}
        self.say(f"{kind}: loss by MCMC steps" if self.is_energy else f"{kind}: loss")
        result["by_steps"] = self.by_steps()
        if self.config.model.embedding_dim is not None:
            self.say(f"{kind}: errors of frames")
            steps = result["by_steps"]["steps"][-1]
            result["frames"] = frame_errors(self.model, self.batches(), steps, self.data.preprocess, self.world)
        self.say(f"{kind}: calibration")
        usual = self.tabulate(self.batches(), Thinking())
        result["calibration"] = calibration(usual)
        if self.is_energy:
            self.say(f"{kind}: thinking")
            result["thinking"] = self.thinking(usual)
        self.say(f"{kind}: out of distribution")
        result["out_of_distribution"] = self.out_of_distribution(usual)
        if self.options.questions is not None:
            self.say(f"{kind}: choices")
            result["choices"] = self.choices(self.options.questions)
        return result

    def tabulate(self, batches: Iterable[Batch], thinking: Thinking) -> Table:
        """Predict every position of the batches of all ranks."""
        return tabulate(self.model, batches, thinking, self.world, self.data.preprocess)

    def describe(self) -> dict[str, Any]:
        """Return what the model is, and what it has seen, as far as its run tells."""
        flops = training_flops_per_token(self.config.model, self.config.mcmc, self.config.data.sequence_length)
        records = self.trained.records
        tokens = max((record["tokens"] for record in records), default=None)
        curve = [
            [record["tokens"] * flops, record["loss_last_step"]]
            for record in records
            if record["kind"] == "val" and record["loss_last_step"] is not None
        ]
        return {
            "path": str(self.trained.checkpoint),
            "kind": self.config.model.kind,
            "variant": self.config.model.variant,
            "step": self.trained.step,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "trained_steps": self.trained_steps,
            "tokens": tokens,
            "training_flops": None if tokens is None else tokens * flops,
            "validation_by_flops": curve,
        }

    def by_steps(self) -> dict[str, Any]:
        """Return loss, perplexity, bits per byte and energy after every number of MCMC steps."""
        steps = max(*self.options.steps, self.trained_steps) if self.is_energy else 1
        found = evaluate(self.model, self.batches(), steps, self.world.device, observe=self.data.preprocess)
        assert found is not None
        flops = [self.flops(n, 0) for n in range(1, steps + 1)]
        return {**figures_by_steps(found, self.tokens_per_byte), "flops_per_prediction": flops}

    def thinking(self, usual: Table) -> list[dict[str, Any]]:
        """Return what thinking differently changes, against a single candidate and the steps of training."""
        most = max(*self.options.steps, self.trained_steps)
        assert isinstance(self.model, EnergyBasedTransformer)
        ways = []
        if has_noise(self.model, Thinking()):  # else all candidates are the same
            ways += [Thinking(candidates=number) for number in self.options.candidates if number > 1]
        ways += [Thinking(steps=most)]
        ways += [Thinking(steps=most, energy_tolerance=threshold) for threshold in self.options.energy_tolerances]
        ways += [Thinking(steps=most, accept_only_decrease=True)]
        rows = [self._thought(Thinking(), usual, usual)]
        return rows + [self._thought(way, self.tabulate(self.batches(), way), usual) for way in ways]

    def _thought(self, way: Thinking, table: Table, usual: Table) -> dict[str, Any]:
        assert table.energies is not None
        steps, nfe = table.mean(table.steps), table.mean(table.nfe)
        change, error = table.change(usual)
        return {
            "steps": way.steps or self.trained_steps,
            "candidates": way.candidates,
            "energy_tolerance": way.energy_tolerance,
            "accept_only_decrease": way.accept_only_decrease,
            "loss": table.mean(table.losses),
            "change": [change, error],
            "energy": table.mean(table.energies),
            "mean_steps": steps,
            "mean_nfe": nfe,
            # Each candidate ends with an evaluation that only measures.
            "flops_per_prediction": self.flops(nfe - way.candidates, way.candidates, way.steps),
        }

    def flops(self, steps: float, measured: int, max_mcmc_steps: int | None = None) -> float:
        """Return the FLOPs of a prediction of `steps` MCMC steps, on the landscapes that at most so many visit."""
        model = self.config.model
        if not self.is_energy:
            return prediction_flops(model, self.config.data.sequence_length)
        landscapes = min(model.num_landscapes, max_mcmc_steps or math.ceil(steps))
        return prediction_flops(model, self.config.data.sequence_length, landscapes, steps, measured)

    def out_of_distribution(self, usual: Table) -> dict[str, Any]:
        """Return how well each score of a sequence tells strange ones from the held-out ones."""
        worlds = {"shuffled": self.tabulate(shuffled(self.batches, self.trained.pad_id), Thinking())}
        tokenizer, text = self.trained.tokenizer, self.options.other_text
        if tokenizer is not None and text is not None:
            tokens = np.array([tokenizer.eos_id, *encode_text(tokenizer, text)])
            rows = rows_of_tokens(tokens, self.config.data.sequence_length, len(usual.losses))
            if not len(rows):
                raise UserError(f"the other text has only {len(tokens)} tokens: give at least one whole sequence")
            batches = row_batches(rows, self.options.batch_size, self.world)
            worlds["other text"] = self.tabulate(batches, Thinking())
        result: dict[str, Any] = {}
        for name, strange in worlds.items():
            result[name] = {"sequences": len(strange.by_sequence(strange.losses))}
            for title, column in SCORES.items():
                here, there = getattr(usual, column), getattr(strange, column)
                if here is not None:
                    pair = strange.by_sequence(there), usual.by_sequence(here)
                    result[name][title] = {
                        "auroc": list(auroc(*pair)),
                        "mean": [scores.mean().item() for scores in pair],
                        "scores": [scores.tolist() for scores in pair],
                    }
        return result

    def choices(self, path: Path) -> dict[str, Any]:
        """Return how often the right choice is found."""
        tokenizer = self.trained.tokenizer
        if tokenizer is None:
            raise UserError("choices are text: this model came without a tokenizer")
        questions = read_questions(path)
        pairs = [
            (tokenizer.encode(question.context) or [tokenizer.eos_id], tokenizer.encode(choice))
            for question in questions
            for choice in question.choices
        ]
        flat = iter(
            score(
                self.model,
                pairs,
                pad_id=tokenizer.pad_id,
                max_context=self.config.data.sequence_length,
                thinking=Thinking(),
                batch_size=self.options.batch_size,
                device=self.world.device,
            )
        )
        scores = [[next(flat) for _ in question.choices] for question in questions]
        return {"questions": len(questions), "accuracy": accuracies(questions, scores)}


SCORES = {
    "energy of what comes": "observed",
    "energy of the prediction": "energies",
    "entropy": "entropies",
    "loss": "losses",
}
"""Scores of a sequence, each a mean over its positions; only the first and the last look at what truly comes."""


def calibration(table: Table) -> dict[str, Any]:
    """Return how the model's own uncertainties go with the true loss of its predictions."""
    result: dict[str, Any] = {"loss": table.mean(table.losses)}
    if table.correct is not None:
        result["accuracy"] = table.mean(table.correct)
    loss = table.losses[table.counted]
    for name, column in (("energy", table.energies), ("entropy", table.entropies)):
        if column is not None:
            uncertainty = column[table.counted]
            result[name] = {
                "pearson": pearson(uncertainty, loss),
                "spearman": spearman(uncertainty, loss),
                "spearman_of_sequences": spearman(table.by_sequence(column), table.by_sequence(table.losses)),
                "reliability": [asdict(share) for share in reliability(uncertainty, loss)],
                "risk_coverage": asdict(risk_coverage(uncertainty, loss)),
            }
    return result


def figures_by_steps(found: Result, tokens_per_byte: float | None) -> dict[str, Any]:
    """Return loss, energy and, of text, perplexity and bits per byte after every number of MCMC steps."""
    result: dict[str, Any] = {"steps": [0], "loss": found.step_losses, "tokens": found.tokens}
    if found.energies is not None:
        result["steps"] = list(range(1, len(found.step_losses) + 1))
        result["energy"] = found.energies
        changes = [loss - found.step_losses[0] for loss in found.step_losses]
        result["change_from_first"] = [list(pair) for pair in zip(changes, found.standard_errors, strict=True)]
    if found.copy_loss is not None:
        result["copy_loss"] = found.copy_loss
    if tokens_per_byte is not None:
        result["perplexity"] = found.perplexities
        result["bits_per_byte"] = [loss * tokens_per_byte / math.log(2) for loss in found.step_losses]
    return result


def side_by_side(result: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """Compare two models as they are, and where both had been trained with the same number of FLOPs."""
    models = {"model": result, "baseline": baseline}
    comparison: dict[str, Any] = {
        name: {key: one["model"][key] for key in ("parameters", "tokens", "training_flops")}
        | {"loss": one["calibration"]["loss"]}
        for name, one in models.items()
    }
    flops = [one["model"]["training_flops"] for one in models.values()]
    if None not in flops:
        comparison["equal_flops"] = {"flops": min(flops)} | {
            name: _loss_at(one["model"]["validation_by_flops"], min(flops)) for name, one in models.items()
        }
    return comparison


def _loss_at(curve: list[list[float]], flops: float) -> float | None:
    """Return the validation loss at a number of training FLOPs, between two validations on a logarithmic scale."""
    if not curve or not curve[0][0] <= flops * (1 + 1e-9) or flops > curve[-1][0] * (1 + 1e-9):
        return None
    points, losses = zip(*curve, strict=True)
    return float(np.interp(math.log(flops), np.log(points), losses))
