"""Time and memory of the candidates' attention on a GPU: fused kernels against matrices, alone and in a training step.

python benchmarks/attention.py --json

First whole training steps in bfloat16, and those of the autoregressive twin. Then attention alone: the candidate pass
and its gradient, and the tangent pass and its backward, beside torch's causal attention of one stream. With
`--compiled`, last, compiled training steps, whose first step takes minutes. `peak_mib` is what a call holds at most
beyond what was there before it. Kernels are built at first, in processes side by side. What fails or does not fit into
memory or into `--budget` seconds is recorded as that, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from ebwm_dist.config.schema import MCMCConfig, ModelConfig  # noqa: E402
from ebwm_dist.mcmc.ebt import EnergyBasedTransformer  # noqa: E402
from ebwm_dist.mcmc.schedule import StepPlan  # noqa: E402
from ebwm_dist.mcmc.vocabulary import VocabularySpace  # noqa: E402
from ebwm_dist.models.autoregressive import AutoregressiveTransformer  # noqa: E402
from ebwm_dist.models.candidate_attention import attend_by_matrices  # noqa: E402
from ebwm_dist.models.flops import peak_flops, training_flops_per_token  # noqa: E402
from ebwm_dist.models.fused_attention import attend_fused  # noqa: E402

Record = dict[str, Any]
ATTENTION = {"fused": attend_fused, "math": attend_by_matrices}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STEPS = ("fused", "math", "math_512", "ar")
COMPILED = ("fused_compiled", "ar_compiled")
CANDIDATES = 16384
MCMC_STEPS = 2
START = time.monotonic()


def attention_inputs(
    sequence: int, width: int, dtype: str, tangent: bool, args: argparse.Namespace
) -> tuple[list[Tensor], Tensor]:
    """Return q, k, v, keys, values and how many keys each candidate sees."""
    rows, heads = max(1, args.candidates // sequence), max(1, args.width // width)
    sizes = [rows * (1 + tangent)] * 3 + [rows] * 2
    shapes = [(size, sequence, heads, width) for size in sizes]
    tensors = [torch.randn(shape, device=args.device).to(DTYPES[dtype]).transpose(1, 2) for shape in shapes]
    return tensors, torch.arange(1, sequence + 1, device=args.device)


def measure_attention(method: str, sequence: int, width: int, dtype: str, args: argparse.Namespace) -> Record:
    """Time the passes of one method."""
    found: Record = {}
    for tangent in (False, True):
        x, seen = attention_inputs(sequence, width, dtype, tangent, args)
        name = "tangent" if tangent else "candidate"
        if method == "sdpa":
            if tangent:
                break
            x, name = [x[0], x[3], x[4]], "stream"

            def attend(*x: Tensor) -> Tensor:
                return torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True)
        else:

            def attend(*x: Tensor, seen: Tensor = seen, tangent: bool = tangent) -> Tensor:
                return ATTENTION[method](*x, seen, tangent)

        # The candidate pass needs no gradient of the context.
        wrt = [y.requires_grad_() for y in (x if tangent or method == "sdpa" else x[:3])]
        cotangent = torch.randn_like(x[0])

        def forward(attend: Callable[..., Tensor] = attend, x: list[Tensor] = x) -> None:
            with torch.no_grad():
                attend(*x)

        def both(
            attend: Callable[..., Tensor] = attend,
            x: list[Tensor] = x,
            wrt: list[Tensor] = wrt,
            cotangent: Tensor = cotangent,
        ) -> None:
            torch.autograd.grad(attend(*x), wrt, cotangent)

        whole = measure(both, args)
        found[f"{name}_forward_ms"] = measure(forward, args)["ms"]
        found |= {f"{name}_ms": whole["ms"], f"{name}_peak_mib": whole["peak_mib"]}
    return found


def build_step(method: str, sequence: int, args: argparse.Namespace) -> tuple[Callable[[], Tensor], float]:
    """Return a training step of a method, and its FLOPs."""
    torch.manual_seed(0)
    kind = "ar" if method.startswith("ar") else "ebt"
    heads = max(1, args.width // 64)
    shape = ModelConfig(kind=kind, vocab_size=args.vocab, dim=args.width, num_layers=args.layers, num_heads=heads)
    mcmc = MCMCConfig(num_steps=MCMC_STEPS, step_size=0.01, initial_state="zeros")
    model: Any
    with torch.device(args.device):
        if kind == "ar":
            model = AutoregressiveTransformer(shape, 0)
        else:
            chunk = 512 if method.endswith("512") else sequence
            model = EnergyBasedTransformer(shape, mcmc, VocabularySpace(shape, mcmc, 0), seed=0, position_chunk=chunk)
    model.to(torch.bfloat16)
    if method.startswith("fused"):
        model.fuse_attention()
    if method.endswith("compiled"):
        model.compile_blocks()
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    rows = max(1, args.candidates // sequence)
    tokens = torch.randint(1, args.vocab, (rows, sequence + 1)).to(args.device)
    plan: Any = None if kind == "ar" else StepPlan(MCMC_STEPS)

    def step() -> Tensor:
        return model.training_step(tokens, torch.arange(rows), plan).loss

    return step, training_flops_per_token(shape, mcmc, sequence) * rows * sequence


def measure_step(method: str, sequence: int, args: argparse.Namespace) -> Record:
    """Time a training step, after a first one that may compile."""
    step, flops = build_step(method, sequence, args)
    losses: list[Tensor] = []
    found = measure(lambda: losses.append(step()), args)
    seconds = found["ms"] / 1000
    peak = peak_flops(torch.cuda.get_device_name()) if args.device == "cuda" else None
    return {
        "seconds": round(seconds, 4),
        "peak_mib": found["peak_mib"],
        "loss": round(losses[-1].item(), 4),
        "tflops": round(flops / seconds / 1e12, 3),
        "mfu": peak and round(flops / seconds / peak, 4),
    }


def measure(call: Callable[[], object], args: argparse.Namespace) -> Record:
    """Return the median time of a call, by the events of the GPU, and the most MiB that it holds (None on the CPU)."""
    call()
    times, before = [], 0
    if args.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(args.repeats):
        if args.device == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            call()
            last.record()
            torch.cuda.synchronize()
            times.append(first.elapsed_time(last))
        else:
            start = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - start))
    peak = None
    if args.device == "cuda":
        peak = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    return {"ms": round(statistics.median(times), 4), "peak_mib": peak}


def guarded(measurement: Callable[[], Record], args: argparse.Namespace) -> Record:
    """Return what is measured, or why it is not."""
    if time.monotonic() - START > args.budget:
        return {"error": "out of time"}
    try:
        return measurement()
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    finally:
        if args.device == "cuda":
            torch.cuda.empty_cache()


def prepare(part: int, parts: int, args: argparse.Namespace) -> None:
    """Compile a part of the kernels, which Triton keeps on the disk for the process that measures."""
    small = argparse.Namespace(**{**vars(args), "candidates": 64, "repeats": 1})
    for dtype, width in [*product(args.dtypes, args.head_widths)][part::parts]:
        guarded(lambda dtype=dtype, width=width: measure_attention("fused", 64, width, dtype, small), small)


def arguments_of(args: argparse.Namespace) -> list[str]:
    """Return the command line that gives these arguments."""
    given = []
    for name in ("device", "budget", "repeats", "candidates", "layers", "width", "vocab"):
        given += [f"--{name}", str(getattr(args, name))]
    for name in ("sequences", "head_widths", "dtypes", "step_sequences"):
        given += [f"--{name.replace('_', '-')}", ",".join(map(str, getattr(args, name)))]
    return given


def measurements(args: argparse.Namespace) -> Iterator[Record]:
    """Yield a record for every setting and method."""
    if args.device == "cuda":
        parts = len(args.dtypes) * len(args.head_widths)
        commands = [
            [sys.executable, __file__, *arguments_of(args), "--prepare", f"{part},{parts}"] for part in range(parts)
        ]
        for worker in [subprocess.Popen(command, stderr=subprocess.DEVNULL) for command in commands]:
            worker.wait()
    yield {"what": "preparation", "seconds": round(time.monotonic() - START, 1)}

    def steps(methods: tuple[str, ...]) -> Iterator[Record]:
        for sequence, method in product(args.step_sequences, methods):
            about = {"what": "training step", "method": method, "sequence": sequence}
            measure = (method, sequence, args)
            yield about | guarded(lambda measure=measure: measure_step(*measure), args)

    yield from steps(STEPS)
    for dtype, width, sequence in product(args.dtypes, args.head_widths, args.sequences):
        for method in ("fused", "math", "sdpa"):
            about = {"what": "attention", "method": method, "sequence": sequence, "head_width": width, "dtype": dtype}
            measure = (method, sequence, width, dtype, args)
            yield about | guarded(lambda measure=measure: measure_attention(*measure), args)
    if args.compiled:
        yield from steps(COMPILED)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser.add_argument("--sequences", type=numbers, default=[256, 1024, 4096, 8192], help="of attention alone")
    parser.add_argument("--head-widths", type=numbers, default=[64, 128])
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=[*DTYPES])
    parser.add_argument("--step-sequences", type=numbers, default=[1024, 4096], help="of training steps")
    parser.add_argument("--candidates", type=int, default=CANDIDATES, help="positions at a time, at least a sequence")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=75.0, help="seconds after which nothing more is started")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries the program out")
    parser.add_argument("--compiled", action="store_true", help="compiled training steps too; needs a larger budget")
    parser.add_argument("--json", action="store_true", help="print a JSON list at the end; the rest goes to stderr")
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure everything; return 1 if nothing of the fused kernels could be measured."""
    args = arguments()
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")  # as in training
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if args.prepare:
        prepare(*map(int, args.prepare.split(",")), args)
        return 0
    records: list[Record] = []
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    for record in measurements(args):
        records.append(record | {"device": device, "torch": torch.__version__})
        print(f"{time.monotonic() - START:6.1f} s", json.dumps(record), file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps(records, indent=1))
    return 0 if any(record.get("method") == "fused" and "error" not in record for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
