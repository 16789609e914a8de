"""Train a recipe of the small language model through the trainer, and append its perplexities to a file.

    python benchmarks/text_recipes.py --recipe shipped --seed 0 --save benchmarks/results/text_recipes.jsonl
    python benchmarks/text_recipes.py --recipe twin --set optimizer.lr=6e-3 training.max_steps=520

A recipe is `configs/quickstart.yaml` with other settings, and sometimes a prototype: a part that the package does not
have. A line holds perplexities of all held-out text after 1, 2, 3, 4 and 8 MCMC steps, the changes of the loss from the
first step with their standard errors over sequences, and the curvature before each step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ebwm_dist.mcmc.build as build  # noqa: E402 (a script, run from anywhere)
from ebwm_dist.config.loading import load_config  # noqa: E402
from ebwm_dist.config.schema import Config  # noqa: E402
from ebwm_dist.devices import default_device  # noqa: E402
from ebwm_dist.errors import UserError  # noqa: E402
from ebwm_dist.files import append_record, read_records  # noqa: E402
from ebwm_dist.mcmc import noise  # noqa: E402
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer  # noqa: E402
from ebwm_dist.mcmc.slices import Slice  # noqa: E402
from ebwm_dist.models.energy_transformer import EnergyHead, EnergyTransformer  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "text_recipes.jsonl"
STEPS = (1, 2, 3, 4, 8)
ALPHA = "mcmc.step_size=1.0"
"""Of the recipes that name no other."""
CORRUPTION = 1 << 20
"""The draw of the corrupted targets, beyond those of the package."""
build_shipped = build.build_model

CHAIN = ["mcmc.gradient=full"]
TWO = ["mcmc.num_steps=2", "mcmc.max_num_steps=null"]
ONE = ["mcmc.num_steps=1", "mcmc.max_num_steps=null"]
WIDE = {"read_in_scale": 128**0.5}
WIDE_ALPHA = ["mcmc.step_size=0.088"]
FOUR_TIMES = ["model.dim=256", "model.num_heads=4"]


@dataclass(frozen=True)
class Recipe:
    """What differs from `configs/quickstart.yaml`."""

    settings: list[str] = field(default_factory=list)
    read_in_scale: float = 1.0
    """A factor of the candidate's embedding."""
    head: str | None = None
    """`squared`: E = |M h|^2 / 2; `distance`: E = |M h - e|^2 / 2."""
    corrupted_targets: bool = False
    """Half of the positions start training from a token: with a drawn chance the target, else a random other."""

    def __post_init__(self) -> None:
        """Refuse prototypes that are none."""
        if self.head not in (None, "squared", "distance"):
            raise ValueError(f"head = {self.head}")


RECIPES: dict[str, Recipe] = {
    "twin": Recipe(["model.kind=ar"]),
    "shipped": Recipe(),
    "shipped, one step": Recipe(ONE),
    "shipped, chain": Recipe(CHAIN),
    "norm_eps 1e-2": Recipe(["model.norm_eps=0.01"]),
    "squared head": Recipe(["mcmc.step_size=0.1"], head="squared"),
    "distance head": Recipe(head="distance"),
    "distance head, wide read-in, chain": Recipe([*CHAIN, *WIDE_ALPHA], head="distance", **WIDE),
    "wide read-in": Recipe(WIDE_ALPHA, **WIDE),
    "wide read-in, chain": Recipe([*CHAIN, *WIDE_ALPHA], **WIDE),
    "read-in times 4, chain": Recipe([*CHAIN, "mcmc.step_size=0.25"], read_in_scale=4.0),
    "wide read-in, chain, two or three steps": Recipe([*CHAIN, *WIDE_ALPHA, "mcmc.num_steps=2"], **WIDE),
    "wide read-in, chain, mirror": Recipe([*CHAIN, *WIDE_ALPHA, "mcmc.update=mirror"], **WIDE),
    "tied embeddings, chain": Recipe([*CHAIN, "mcmc.step_size=0.042", "model.tie_embeddings=true"]),
    "corrupted target": Recipe([*TWO], corrupted_targets=True),
    "corrupted target, wide read-in": Recipe([*TWO, *WIDE_ALPHA], corrupted_targets=True, **WIDE),
    "two landscapes": Recipe(
        [*TWO, *CHAIN, "model.variant=time_embed", "model.num_landscapes=2", "mcmc.loss=mean"],
    ),
    "two landscapes, wide read-in": Recipe(
        [*TWO, *CHAIN, *WIDE_ALPHA, "model.variant=time_embed", "model.num_landscapes=2"], **WIDE
    ),
    "one layer, one step": Recipe([*ONE, "model.num_layers=1"]),
    "one layer, wide read-in, one step": Recipe([*ONE, *WIDE_ALPHA, "model.num_layers=1"], **WIDE),
    "one layer, wide read-in, chain": Recipe([*CHAIN, *WIDE_ALPHA, "model.num_layers=1"], **WIDE),
    "one layer, two landscapes, wide read-in": Recipe(
        [*TWO, *CHAIN, *WIDE_ALPHA, "model.num_layers=1", "model.variant=time_embed", "model.num_landscapes=2"], **WIDE
    ),
    "twin, one layer": Recipe(["model.kind=ar", "model.num_layers=1"]),
    "four times, twin": Recipe(["model.kind=ar", *FOUR_TIMES]),
    "four times": Recipe(FOUR_TIMES),
    "four times, wide read-in, chain": Recipe([*CHAIN, "mcmc.step_size=0.0625", *FOUR_TIMES], read_in_scale=16.0),
}


class Head(EnergyHead):
    """Prototypes of quadratic energies, over the weight of the bilinear one."""

    distance: bool

    def forward(self, h: Tensor, candidate: Tensor, tangent: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return energies [B, C], and with a tangent also their derivatives, as `EnergyHead` does."""
        dtype = torch.promote_types(h.dtype, torch.float32)
        mapped = nn.functional.linear(h.to(dtype), self.weight.to(dtype))
        if tangent is None:
            rest = mapped - candidate if self.distance else mapped
            return rest.square().sum(-1) / 2
        mapped, d_mapped = mapped.chunk(2)
        rest, d_rest = (mapped - candidate, d_mapped - tangent) if self.distance else (mapped, d_mapped)
        return torch.cat((rest.square().sum(-1) / 2, (rest * d_rest).sum(-1)))


class WideTransformer(EnergyTransformer):
    """A prototype that takes candidates times `read_in_scale`."""

    read_in_scale: float

    def candidate_pass(self, candidate: Tensor, *rest: Any) -> Any:  # type: ignore[override]
        """Return energies [B, C] of candidates [B, C, D], and outputs of every block."""
        return super().candidate_pass(self.read_in_scale * candidate, *rest)

    def energy_with_tangent(self, candidate: Tensor, tangent: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return energies and derivatives of candidates along tangents [B, C, D]."""
        return super().energy_with_tangent(self.read_in_scale * candidate, self.read_in_scale * tangent, *rest)


class FromCorruptedTargets(EnergyBasedTransformer):
    """A prototype whose training starts half of the positions from a token that may be the target."""

    following: Tensor

    def training_step(self, observed: Tensor, sample_ids: Tensor, plan: Any, **rest: Any) -> Any:  # type: ignore[override]
        """Keep the targets for `_initial_state`."""
        self.following = observed[:, 1:]
        return super().training_step(observed, sample_ids, plan, **rest)

    def _initial_state(self, context: Tensor, sample_ids: Tensor, replayed: Any, where: Slice, done: int) -> Tensor:
        state = super()._initial_state(context, sample_ids, replayed, where, done)
        target = where.take(self.following[:, where.start : where.stop])
        drawn = noise.uniform(self.seed, sample_ids, CORRUPTION, where.start, where.stop, 4, state.device)
        used, level, hit, other = where.take(drawn).unbind(-1)
        another = (other * state.shape[-1]).long().clamp(max=state.shape[-1] - 1)
        token = torch.where(hit < level, target, another)[..., None]
        peak = torch.zeros_like(state).scatter_(-1, token, self.mcmc.initial_sharpness)
        return torch.where((used < 0.5)[..., None], peak, state)


def build_model(recipe: Recipe, config: Config, pad_id: int | None) -> build.Model:
    """Return the model of the package with the recipe's prototypes."""
    model = build_shipped(config, pad_id)
    if not isinstance(model, EnergyBasedTransformer):
        return model
    if recipe.head is not None:
        assert config.model.energy_head == "bilinear"  # which has the weight
        model.transformer.head.__class__ = Head
        model.transformer.head.distance = recipe.head == "distance"  # type: ignore[assignment]
    if recipe.read_in_scale != 1:
        model.transformer.__class__ = WideTransformer
        model.transformer.read_in_scale = recipe.read_in_scale  # type: ignore[assignment]
    if recipe.corrupted_targets:
        model.__class__ = FromCorruptedTargets
    return model


def measure(run_dir: Path, max_sequences: int) -> dict[str, Any]:
    """Return what a line holds of a finished run."""
    from ebwm_dist.evaluation.errors_by_step import measure, merge
    from ebwm_dist.run import Run

    run = Run(run_dir, default_device())
    found = merge([measure(run, run.validation_data(), max(STEPS), max_sequences, 32)])
    records = read_records(run_dir / "metrics.jsonl")
    trained = [record for record in records if record["kind"] == "train"]
    last, steps = trained[-20:], [n for n in STEPS if n <= len(found["perplexity"])]
    figures: dict[str, Any] = {
        "steps": run.step,
        "tokens": trained[-1]["tokens"],
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "perplexity": {str(n): round(found["perplexity"][n - 1], 3) for n in steps},
        "held_out_tokens": found["tokens"],
        "train_loss": round(sum(record["loss_last_step"] for record in last) / len(last), 4),
        "gradient_norm": round(sum(record["grad_norm"] for record in last) / len(last), 3),
    }
    if "change_from_first" in found:
        changes = found["change_from_first"]
        figures["change_from_first"] = {str(n): [round(x, 5) for x in changes[n - 1]] for n in steps[1:]}
        figures["energy"] = [round(found["energy"][n], 3) for n in (0, *steps)]
        figures["alpha"] = round(trained[-1]["mcmc_step_size"], 6)
        figures["curvature"] = [record for record in records if record["kind"] == "val"][-1].get("curvature")
    return figures


def main() -> None:
    """Train and measure one recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=sorted(RECIPES), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="further settings")
    parser.add_argument("--max-sequences", type=int, default=100_000, help="held-out sequences (all)")
    parser.add_argument("--save", type=Path, help="file to which the line is appended")
    args = parser.parse_args()
    recipe, begin, folder = RECIPES[args.recipe], time.time(), Path(tempfile.mkdtemp())
    settings = [*recipe.settings, *args.set]
    fixed = [f"seed={args.seed}", f"run_dir={folder / 'run'}", "validation.curvature=true"]
    fixed += ["validation.interval=1000000", "validation.max_sequences=32", "checkpoint.interval=1000000"]
    build.build_model = lambda config, pad_id: build_model(recipe, config, pad_id)  # before others take it from there
    from ebwm_dist.training.train import train

    prototype = {
        name: value for name, value in vars(recipe).items() if name != "settings" and value not in (None, False, 1.0)
    }
    record: dict[str, Any] = {"recipe": args.recipe, "settings": settings, "prototype": prototype, "seed": args.seed}
    record |= {"program": "trainer", "device": default_device().type, "torch": torch.__version__}
    try:
        config = load_config(ROOT / "configs" / "quickstart.yaml", [ALPHA, *settings, *fixed])
        train(config)
        record["seconds"] = round(time.time() - begin, 1)
        record |= measure(folder / "run", args.max_sequences)
    except UserError as error:
        record["error"] = str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(record), flush=True)
    if args.save is not None:
        append_record(args.save, record)


if __name__ == "__main__":
    main()
