"""Tokens per second with the context cache against running the prefix again for every token, side by side.

python benchmarks/generate.py --context 512
python benchmarks/generate.py --json --context 512

Both continue the same sequences greedily from `--context` tokens, one token of each in turn, and the run fails if their
tokens differ or their energies do by more than rounding. What counts is the time spent per token once the cache is
full; filling it is told apart. On the CPU it is the time of the processor, so that other processes do not matter.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from torch import Tensor

from ebwm_dist.config.schema import Config, MCMCConfig, ModelConfig
from ebwm_dist.inference.cache import Prediction, Sequences
from ebwm_dist.inference.settings import Thinking
from ebwm_dist.mcmc.build import build_model

TOLERANCE = 1e-3
"""Largest difference of an energy in float32; they are of the order of 1."""

T = TypeVar("T")


def clocked(work: Callable[[], T], device: str) -> tuple[T, float]:
    """Return the result of `work` and the seconds it has taken: of the processor, or of the GPU until it is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, clock() - start


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Generate with and without the cache."""
    torch.manual_seed(0)
    shape = ModelConfig(
        kind=args.kind,
        variant=args.variant,
        num_landscapes=1 if args.variant == "default" else 2,
        vocab_size=args.vocab,
        dim=args.width,
        num_heads=max(1, args.width // 64),
        num_layers=args.layers,
    )
    config = Config(model=shape, mcmc=MCMCConfig(num_steps=args.steps, step_size=0.01, initial_state="zeros"))
    model = build_model(config, pad_id=0).to(args.device).eval().requires_grad_(False)
    seeds, thinking = list(range(args.batch)), Thinking()
    observed = torch.randint(1, args.vocab, (args.batch, args.context)).to(args.device)
    capacity = args.context + args.tokens + 1

    def rerun() -> Prediction:
        return Sequences(model, list(observed), thinking, seeds, capacity).predict()

    cached = Sequences(model, list(observed), thinking, seeds, capacity)
    prediction, filling = clocked(cached.predict, args.device)
    seconds = {"cached": 0.0, "uncached": 0.0}
    for _ in range(args.tokens):
        tokens = prediction.state.argmax(-1)
        cached.append(tokens)
        observed = torch.cat((observed, tokens[:, None]), 1)
        prediction, one = clocked(cached.predict, args.device)
        again, other = clocked(rerun, args.device)
        compare(prediction, again)
        seconds["cached"] += one
        seconds["uncached"] += other
    written = args.tokens * args.batch
    rates = {name: {"tokens_per_second": written / spent} for name, spent in seconds.items()}
    return {
        "context": args.context,
        **rates,
        "ratio": seconds["uncached"] / seconds["cached"],
        "seconds_to_fill": filling,
        **{name: getattr(args, name) for name in ("kind", "variant", "steps", "layers", "width", "vocab", "batch")},
        "tokens": args.tokens,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "clock": "wall" if args.device == "cuda" else "processor",
        "threads": args.threads,
        "torch": version("torch"),
    }


def compare(cached: Prediction, again: Prediction) -> None:
    """Fail unless both say the same."""
    same: Tensor = cached.state.argmax(-1) == again.state.argmax(-1)
    if not same.all():
        raise SystemExit("cached and uncached generation choose different tokens")
    if cached.energies is not None and again.energies is not None:
        error = (cached.energies - again.energies).abs().max().item()
        if not error <= TOLERANCE:
            raise SystemExit(f"cached and uncached energies differ by {error}")


def main() -> int:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=512, help="tokens before the first generated one")
    parser.add_argument("--tokens", type=int, default=4, help="tokens generated for each sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences (default: %(default)s)")
    parser.add_argument("--kind", choices=("ebt", "ar"), default="ebt")
    parser.add_argument("--variant", choices=("default", "time_embed", "adaln"), default="time_embed")
    parser.add_argument("--steps", type=int, default=2, help="MCMC steps")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = measure(args)
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    for name in ("cached", "uncached"):
        print(f"{name:9} {result[name]['tokens_per_second']:8.2f} tokens/s")
    print(f"ratio     {result['ratio']:8.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
