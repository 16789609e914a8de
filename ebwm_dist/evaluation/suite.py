"""All measurements of one model on held-out data, as one dictionary for JSON.

All figures are made of tables that are the same on every rank, or of sums over all ranks, so that they do not depend on
the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from ebwm_dist.data.loading.stream import Batch
from ebwm_dist.distributed import World
from ebwm_dist.evaluation.difficulty import accuracy_by_steps, best_of, example, has_difficulties, stopping
from ebwm_dist.evaluation.errors_by_step import measure, merge
from ebwm_dist.evaluation.multiple_choice import accuracies, score_choices
from ebwm_dist.evaluation.options import Options
from ebwm_dist.evaluation.out_of_distribution import encode_sequences, separation, shuffled, text_batches
from ebwm_dist.evaluation.predictions import Batches, Table, tabulate, tabulate_steps
from ebwm_dist.evaluation.true_frames import true_frame_is_lower
from ebwm_dist.evaluation.uncertainty import pearson, reliability, risk_coverage, spearman, worst_tenth
from ebwm_dist.inference.api import Predictor
from ebwm_dist.inference.settings import Thinking
from ebwm_dist.inference.thinking import has_noise
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.models.flops import prediction_flops, training_flops_per_token
from ebwm_dist.run import Run, ValidationData

Log = Callable[[str], None]


class Suite:
    """The measurements of one model on held-out data."""

    def __init__(self, run: Run, data: ValidationData, options: Options, world: World, log: Log):
        self.trained, self.data, self.options, self.world = run, data, options, world
        self.model, self.config = run.model, run.config
        self.is_energy = self.config.model.kind == "ebt"
        self.max_mcmc_steps = max(*options.steps, run.trained_steps) if self.is_energy else 1
        self.log: Log = lambda text: log(f"{self.config.model.kind}: {text}")
        self.batches: Batches = partial(
            data.batches, options.batch_size, options.max_sequences, world.rank, world.world_size
        )
        if options.ood_text is not None and run.tokenizer is not None:  # too short: refused before anything is computed
            encode_sequences(options.ood_text, run.tokenizer, self.config.data.sequence_length)

    def run(self) -> dict[str, Any]:
        """Take all measurements."""
        result: dict[str, Any] = {"model": self.describe()}
        self.log("losses by MCMC step")
        result["by_steps"] = self.by_steps()
        frames = self.data.preprocess.frames_are_states(self.config.model)
        if frames and isinstance(self.model, EnergyBasedTransformer):
            result["true_frame_is_lower"] = true_frame_is_lower(
                self.model, self.batches, self.data.preprocess, self.world
            )
        if self.config.model.embedding_dim is None and has_difficulties(
            self.data.batches(self.options.batch_size, self.options.max_sequences)
        ):
            self.log("answers by difficulty")
            result["by_difficulty"] = self.by_difficulty()
        if self.options.only_errors:
            return result
        self.log("calibration")
        held_out = self.tabulate(self.batches(), Thinking())
        result["calibration"] = calibration(held_out)
        if isinstance(self.model, EnergyBasedTransformer):
            self.log("thinking")
            result["thinking"] = self.thinking(self.model, held_out)
        self.log("out of distribution")
        result["out_of_distribution"] = self.out_of_distribution(held_out)
        if self.options.questions:
            self.log("multiple choice")
            result["multiple_choice"] = self.multiple_choice()
        return result

    def tabulate(self, batches: Iterable[Batch], thinking: Thinking, draw: int = 0) -> Table:
        """Predict every target of the batches of all ranks; each `draw` has noise of its own."""
        return tabulate(self.model, batches, thinking, self.world, self.data.preprocess, draw)

    def describe(self) -> dict[str, Any]:
        """Describe the model and its training, of which an export has no record."""
        config, share = self.config, self.trained.sample_format.get("target_share", 1.0)
        flops = training_flops_per_token(config.model, config.mcmc, config.data.sequence_length, share)
        records = self.trained.records
        tokens = max((record["tokens"] for record in records), default=None)
        return {
            "path": self.trained.source,
            "kind": self.config.model.kind,
            "loss_of": self.model.loss_of,
            "variant": self.config.model.variant,
            "step": self.trained.step,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "trained_steps": self.trained.trained_steps,
            "tokens": tokens,
            "training_flops": None if tokens is None else tokens * flops,
            "validation_by_flops": [
                [record["tokens"] * flops, record["loss_last_step"]]
                for record in records
                if record["kind"] == "val" and record["loss_last_step"] is not None
            ],
        }

    def by_steps(self) -> dict[str, Any]:
        """Return losses, energies and errors of frames after every number of MCMC steps, and their cost."""
        options, world = self.options, self.world
        sizes = (self.max_mcmc_steps, options.max_sequences, options.batch_size)
        own = measure(self.trained, self.data, *sizes, world.rank, world.world_size)
        flops = [self.flops(n, 0) for n in range(1, self.max_mcmc_steps + 1)]
        return {**merge(world.gather_objects(own)), "flops_per_prediction": flops}

    def by_difficulty(self) -> dict[str, Any]:
        """Return accuracy by difficulty and MCMC steps; of an energy model also where it stops, and best of several."""
        model, most = self.model, self.max_mcmc_steps
        if not isinstance(model, EnergyBasedTransformer):
            found = accuracy_by_steps({0: self.tabulate(self.batches(), Thinking())})
            return {**found, "flops_per_prediction": [self.flops(1, 0)]}
        numbers = sorted({*self.options.steps, self.trained.trained_steps})
        tables = tabulate_steps(model, self.batches(), [0, *numbers], self.world, self.data.preprocess)
        result = accuracy_by_steps({number: tables[number] for number in numbers})
        result["flops_per_prediction"] = [self.flops(number, 0) for number in numbers]
        result["example"] = example(tables)
        result["stopped"] = []
        for limit in self.options.prediction_tolerances:
            way = Thinking(steps=most, prediction_tolerance=limit)
            found = stopping(self.tabulate(self.batches(), way))
            flops = self.flops(found["steps_of_all"][0], 1, most)
            settings = {"prediction_tolerance": limit, "max_steps": most, "flops_per_prediction": flops}
            result["stopped"].append(settings | found)
        if not self.options.only_errors:
            result["best_of"] = self.best_of(model, most)
        return result

    def best_of(self, model: EnergyBasedTransformer, steps: int) -> list[dict[str, Any]]:
        """Return the accuracy of the best of several candidates for each answer, if they differ."""
        numbers = [number for number in self.options.candidates if number > 1]
        way = Thinking(steps=steps, langevin_noise=self.options.langevin_noise, select="surprisal")
        if numbers and not has_noise(model, way):
            self.log("no best of several candidates: all are the same without noise; set --langevin-noise")
            return []
        tables = [self.tabulate(self.batches(), way, draw) for draw in range(max(numbers, default=0))]
        return [{"candidates": number, "steps": steps, **best_of(tables[:number])} for number in numbers]

    def thinking(self, model: EnergyBasedTransformer, held_out: Table) -> list[dict[str, Any]]:
        """Return losses and cost of other settings than a single candidate and the steps of training."""
        most = self.max_mcmc_steps
        ways = []
        noise = self.options.langevin_noise
        if has_noise(model, Thinking(langevin_noise=noise)):  # else all candidates are the same
            several = [number for number in self.options.candidates if number > 1]
            ways += [Thinking(candidates=number, langevin_noise=noise) for number in several]
        if most != self.trained.trained_steps:
            ways += [Thinking(steps=most)]
        ways += [Thinking(steps=most, energy_tolerance=limit) for limit in self.options.energy_tolerances]
        ways += [Thinking(steps=most, prediction_tolerance=limit) for limit in self.options.prediction_tolerances]
        ways += [Thinking(steps=most, accept_only_decrease=True)]
        rows = [self._thought(Thinking(), held_out, held_out)]
        return rows + [self._thought(way, self.tabulate(self.batches(), way), held_out) for way in ways]

    def _thought(self, way: Thinking, table: Table, held_out: Table) -> dict[str, Any]:
        assert table.energies is not None
        nfe = table.mean(table.nfe)
        return {
            "steps": way.steps or self.trained.trained_steps,
            "candidates": way.candidates,
            "energy_tolerance": way.energy_tolerance,
            "prediction_tolerance": way.prediction_tolerance,
            "accept_only_decrease": way.accept_only_decrease,
            "loss": table.mean(table.losses),
            "change": list(table.change(held_out)),
            "energy": table.mean(table.energies),
            "mean_steps": table.mean(table.steps),
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

    def out_of_distribution(self, held_out: Table) -> dict[str, Any]:
        """Return how well each score separates out-of-distribution sequences from held-out ones."""
        batches = {"shuffled": shuffled(self.batches, self.trained.pad_id)}
        if self.trained.tokenizer is not None:
            batches["other text"] = text_batches(
                self.options.ood_text,
                self.trained.tokenizer,
                self.config.data.sequence_length,
                len(held_out.losses),
                self.options.batch_size,
                self.world,
            )
        return {name: separation(self.tabulate(ood, Thinking()), held_out) for name, ood in batches.items()}

    def multiple_choice(self) -> dict[str, Any]:
        """Return how often the right choice is found."""
        predictor = Predictor(self.model, self.config, self.trained.tokenizer)
        questions = self.options.questions
        scores = score_choices(predictor, questions, self.options.batch_size)
        return {"questions": len(questions), "accuracy": accuracies(questions, scores)}


def calibration(table: Table) -> dict[str, Any]:
    """Return how the model's own uncertainties go with the true loss of its predictions."""
    result: dict[str, Any] = {"loss": table.mean(table.losses)}
    if table.correct is not None:
        result["accuracy"] = table.mean(table.correct)
    loss = table.losses[table.target_mask]
    uncertainties = {
        "energy": table.energies,
        "energy drop": table.energy_drops,
        "entropy": table.entropies,
        "change of the frame": table.moved,
    }
    for name, column in uncertainties.items():
        if column is not None:
            uncertainty = column[table.target_mask]
            result[name] = {
                "pearson": pearson(uncertainty, loss),
                "spearman": spearman(uncertainty, loss),
                "spearman_of_sequences": spearman(table.by_sequence(column), table.by_sequence(table.losses)),
                "worst_tenth": worst_tenth(uncertainty, loss),
                "reliability": reliability(uncertainty, loss),
                "risk_coverage": risk_coverage(uncertainty, loss),
            }
    return result
