"""What low precision does to second-order gradients: the engine in float32 and bfloat16 against itself in float64.

python benchmarks/precision.py
python benchmarks/precision.py --steps 1,2,4 --train-steps 50 --save

All precisions have the same weights, which bfloat16 can hold, the same tokens and the same initial states. Gradients
are added up in float32, as training does. `error` is the norm of the difference over the norm of the gradient in
float64, for each group of parameters; `cosine` is that of the angle between the two.

Beside bfloat16 as it is, each part that the package computes in float32 is put into bfloat16 in turn, to see what
has to stay as it is. Positions are taken through the steps in four slices, so that there are sums to round.

Shapes: B batch, S positions, V vocabulary, D width.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.options import listed
from benchmarks.second_order import processor, save
from ebwm_dist.config.schema import MCMCConfig, ModelConfig
from ebwm_dist.mcmc import second_order, space, vocabulary
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer
from ebwm_dist.mcmc.schedule import StepPlan
from ebwm_dist.mcmc.slices import Slice
from ebwm_dist.models import candidate_attention, energy_transformer, layers

ROOT = Path(__file__).resolve().parents[1]
PAD_ID = 0  # never drawn
RULES = ("probabilities", "logits", "mirror")
GROUPS = {
    "blocks": "transformer.blocks.",
    "vocab_to_embed": "space.vocab_to_embed.",
    "embeddings": "space.embeddings.",
    "head": "transformer.head.",
    "norm": "transformer.norm.",
    "alpha": "space.step_size.",
}
"""Prefixes of the names of parameters."""
KEY = ("rule", "steps", "dtype", "part")
LOW = torch.bfloat16

HEADER = (
    f"| rule | steps | dtype | also in bfloat16 | {' | 1 - cosine | '.join(GROUPS)} | 1 - cosine |\n"
    f"|---|--:|---|---|{'--:|--:|' * len(GROUPS)}"
)

Gradients = dict[str, Tensor]
Record = dict[str, Any]


# The parts in bfloat16 that the package computes in float32.


def rounded(x: Tensor) -> Tensor:
    """Return `x` rounded to bfloat16 in its own precision; its gradient is rounded too."""
    return x.to(LOW).to(x.dtype)


def low_softmax(x: Tensor) -> Tensor:
    """Return the softmax of `x` with every operation in bfloat16; torch's own computes in float32 inside."""
    powers = (x.to(LOW) - x.to(LOW).amax(-1, keepdim=True)).exp()
    return (powers / powers.sum(-1, keepdim=True)).to(x.dtype)


def low_norm(self: layers.RMSNorm, x: Tensor, tangent: Tensor | None = None) -> Any:
    """Do `RMSNorm.forward` in the precision of `x`."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
    y = x * scale
    if tangent is None:
        return y * self.weight
    return y * self.weight, (tangent - y * (y * tangent).mean(-1, keepdim=True)) * scale * self.weight


def low_update() -> AbstractContextManager[Any]:
    """Round the states that steps lead to, and their gradients."""
    exact = vocabulary.next_logits
    return patch.object(vocabulary, "next_logits", lambda rule, z, move: rounded(exact(rule, z, move)))


def low_vocabulary_softmax() -> AbstractContextManager[Any]:
    """Do the softmax of the read-in and of the update in bfloat16; that of attention names its precision."""
    exact = Tensor.softmax
    return patch.object(
        Tensor, "softmax", lambda x, dim, dtype=None: low_softmax(x) if dtype is None else exact(x, dim, dtype=dtype)
    )


AS_IT_IS = "as it is"
WEIGHT_SUMS = "sums of the weights' gradients"
PARTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    AS_IT_IS: nullcontext,
    "states": low_update,
    "energy head": lambda: patch.object(
        energy_transformer.EnergyHead, "forward", lambda self, h, *_: F.linear(h, self.weight).squeeze(-1)
    ),
    "alpha": lambda: patch.object(space.StepSize, "forward", lambda self: self.alpha.clamp(min=space.MIN_STEP_SIZE)),
    "softmax of attention": lambda: patch.object(candidate_attention, "softmax", low_softmax),
    "softmax of the vocabulary": low_vocabulary_softmax,
    "RMSNorm statistics": lambda: patch.object(layers.RMSNorm, "forward", low_norm),
    "sums of the context's gradient": lambda: patch.object(second_order, "_zeros_like", torch.zeros_like),
    WEIGHT_SUMS: nullcontext,
}
"""What puts a part into bfloat16; the last is done by `gradients`."""


def build(args: argparse.Namespace, rule: str) -> EnergyBasedTransformer:
    """Build the model with weights that bfloat16 can hold."""
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=args.vocab, dim=args.width, num_layers=args.layers, num_heads=max(1, args.width // 64)
    )
    mcmc = MCMCConfig(update=rule, step_size=1.0)
    model = EnergyBasedTransformer(shape, mcmc, vocabulary.VocabularySpace(shape, mcmc, PAD_ID), 0, args.seq_len // 4)
    calibrate(model, args)
    train(model, args)
    return model.to(LOW)


@torch.no_grad()
def calibrate(model: EnergyBasedTransformer, args: argparse.Namespace) -> None:
    """Set alpha so that the first step moves the logits by `move`: rules differ by what their gradient is taken by."""
    tokens, ids = batch(args, 0)
    state = model.space.initial_state(ids, model.seed, Slice(0, args.seq_len), tokens[:, :-1])
    _, _, gradient, _ = model.descend(state, model.context_stream(tokens[:, :-1], 0), 0, 0)
    moved = model.space.update(state, gradient) - model.space.update(state, torch.zeros_like(gradient))
    model.space.step_size.alpha.fill_(args.move / moved.square().mean().sqrt().item())


def train(model: EnergyBasedTransformer, args: argparse.Namespace) -> None:
    """Train for some steps, as gradients of weights that were just drawn may not be those of training."""
    alpha = model.space.step_size.alpha
    rest = [p for p in model.parameters() if p is not alpha]
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": [alpha], "lr": 3e-3 * alpha.item()}], lr=1e-3)
    for step in range(args.train_steps):
        model.training_step(*batch(args, 1 + step), StepPlan(2))
        optimizer.step()
        optimizer.zero_grad()


def batch(args: argparse.Namespace, seed: int) -> tuple[Tensor, Tensor]:
    """Return tokens [B, S+1] of which each often follows from the one before it, and ids."""
    generator = torch.Generator().manual_seed(seed)
    shape = (args.batch, args.seq_len + 1)
    tokens = torch.randint(PAD_ID + 1, args.vocab, shape, generator=generator)
    follows = torch.rand(shape, generator=generator) < 0.7
    for i in range(1, shape[1]):
        tokens[:, i] = torch.where(follows[:, i], tokens[:, i - 1] * 7 % (args.vocab - 1) + 1, tokens[:, i])
    return tokens, torch.arange(args.batch) + args.batch * seed


def gradients(
    model: EnergyBasedTransformer, args: argparse.Namespace, dtype: torch.dtype, steps: int, part: str = AS_IT_IS
) -> Gradients:
    """Return the gradient of every group in float64, from a copy of the model in `dtype`."""
    model = deepcopy(model).to(dtype)
    if part != WEIGHT_SUMS:
        for p in model.parameters():
            p.grad_dtype = torch.promote_types(dtype, torch.float32)
    with PARTS[part]():
        model.training_step(*batch(args, 0), StepPlan(steps))
    found = {name: p.grad.double().flatten() for name, p in model.named_parameters() if p.grad is not None}
    return {
        group: torch.cat([gradient for name, gradient in found.items() if name.startswith(prefix)])
        for group, prefix in GROUPS.items()
    }


def compare(found: Gradients, exact: Gradients) -> dict[str, dict[str, float]]:
    """Return error and cosine of every group."""
    return {
        group: {
            "error": ((found[group] - want).norm() / want.norm()).item(),
            "cosine": F.cosine_similarity(found[group], want, dim=0, eps=0).item(),
        }
        for group, want in exact.items()
    }


def records(args: argparse.Namespace) -> Iterator[Record]:
    """Yield the errors of float32, of bfloat16, and of bfloat16 with each part in it as well."""
    for rule in args.rules:
        model = build(args, rule)
        for steps in args.steps:
            exact = gradients(model, args, torch.float64, steps)
            for dtype, part in [("float32", AS_IT_IS), *(("bfloat16", part) for part in PARTS)]:
                found = gradients(model, args, getattr(torch, dtype), steps, part)
                yield {"rule": rule, "steps": steps, "dtype": dtype, "part": part, "groups": compare(found, exact)}


def row(record: Record) -> str:
    """Return a row of the table."""
    cells = [f"{value['error']:.1e} | {1 - value['cosine']:.0e}" for value in record["groups"].values()]
    return f"| {' | '.join([record['rule'], str(record['steps']), record['dtype'], record['part'], *cells])} |"


def main() -> int:
    """Print the table, or a JSON list of its records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", type=listed(str, *RULES), default=list(RULES), help="comma-separated")
    parser.add_argument("--steps", type=listed(int), default=[1, 2, 4], help="numbers of MCMC steps, comma-separated")
    sizes = {"seq-len": 64, "vocab": 1000, "layers": 2, "width": 128, "batch": 1, "train-steps": 50}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--move", type=float, default=1.0, help="root mean square that the first step adds to logits")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.add_argument("--save", action="store_true", help="add the results to those in benchmarks/results/")
    args = parser.parse_args()
    found = []
    print(HEADER, file=sys.stderr if args.json else sys.stdout)
    for record in records(args):
        print(row(record), file=sys.stderr if args.json else sys.stdout, flush=True)
        found.append(record)
    if args.json:
        print(json.dumps(found, indent=1))
    if args.save:
        torch_version = version("torch").split("+")[0]
        options = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in [*sizes, "move"]}
        path = ROOT / "benchmarks" / "results" / f"precision_cpu_torch-{torch_version}.json"
        save(path, {"device": processor(), "torch": torch_version, **options}, found, KEY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
