"""One training step by one method, measured in a process of its own; `second_order.py` starts it.

It takes a `Setting` as JSON on the command line and does one warm-up step. Then it answers each line that comes on
standard input, `time` or `memory`, with a line of JSON on standard output.

Shapes: B batch, S positions, V vocabulary.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.double_backward import DoubleBackward
from ebwm_dist.config.schema import Config, MCMCConfig, ModelConfig
from ebwm_dist.mcmc.build import build_model
from ebwm_dist.models.flops import training_flops_per_token

LIBC = ctypes.CDLL(None)
M_MMAP_THRESHOLD = -3  # of malloc.h
PAD_ID = 0  # never drawn, so that every token counts
STEP_SIZE = 0.01
"""Small enough that steps do not amplify rounding: at 1.0 the gradients of 16 steps differ by 1e-2 even in float64."""


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    method: str
    steps: int
    seq_len: int
    vocab: int
    layers: int
    width: int
    batch: int
    dtype: str
    device: str
    threads: int
    memory_limit: float | None = None
    """GiB of memory that the process may take on the CPU after its imports; None: no limit."""
    landscapes: int = 1
    gradient: str = "truncated"
    """`mcmc.gradient`, of the first-order methods."""
    time_limit: int | None = None
    """Seconds of processor time after which the process is ended, on the CPU; None: no limit."""


@dataclass(frozen=True)
class Method:
    """A training step, which adds to the gradients and returns the loss, and the weights it trains, by name."""

    step: Callable[[], Tensor]
    weights: dict[str, Tensor]
    flops: float | None = None
    """Of a step by the formula."""


def build(setting: Setting) -> Method:
    """Build the method: the weights and the tokens [B, S+1] depend only on the sizes, and all states start at zero."""
    torch.manual_seed(0)
    twin, first_order = setting.method == "autoregressive", setting.method.startswith("first_order")
    shape = ModelConfig(
        kind="ar" if twin else "ebt",
        variant="default" if setting.landscapes == 1 else "time_embed",
        num_landscapes=setting.landscapes,
        vocab_size=setting.vocab,
        dim=setting.width,
        num_layers=setting.layers,
        num_heads=max(1, setting.width // 64),
    )
    mcmc = MCMCConfig(
        num_steps=max(1, setting.steps), step_size=STEP_SIZE, initial_state="zeros", gradient=setting.gradient
    )
    model = build_model(Config(model=shape, mcmc=mcmc), PAD_ID)
    model.to(setting.device, getattr(torch, setting.dtype))
    tokens = torch.randint(PAD_ID + 1, setting.vocab, (setting.batch, setting.seq_len + 1)).to(setting.device)
    weights = dict(model.named_parameters())

    if twin or first_order:
        sample_ids, plan = torch.arange(setting.batch), model.plan(1, 0)
        if setting.method == "first_order_compiled":
            model.compile_blocks()
        flops = training_flops_per_token(shape, mcmc, setting.seq_len) * setting.batch * setting.seq_len
        return Method(lambda: model.training_step(tokens, sample_ids, plan).loss, weights, flops)

    layout = setting.method.removeprefix("double_backward_")
    double = DoubleBackward(weights, shape, setting.seq_len, layout)
    wide = torch.promote_types(getattr(torch, setting.dtype), torch.float32)

    def double_backward() -> Tensor:
        state = torch.zeros(setting.batch, setting.seq_len, setting.vocab, dtype=wide, device=setting.device)
        return double.step(tokens, state, setting.steps)

    return Method(double_backward, double.weights)


def seconds(step: Callable[[], object], device: str) -> float:
    """Return how long one `step` takes: on the CPU, the processor time of all threads."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    synchronize(device)
    start = clock()
    step()
    synchronize(device)
    return clock() - start


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """Return how many bytes of tensors `step` holds at most at one time, beyond those that are there before it.

    On the CPU the memory events of the profiler are summed up: torch's allocator reports every allocation, and every
    release of what it has reported, with its exact size. Resident memory is no measure of a step, as it also holds
    what malloc keeps for later, and torch counts its own allocations on the CPU nowhere else.
    """
    if device == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), default=0)


def unpack_heap() -> None:
    """Make malloc give every tensor of some size pages of its own, and hand free ones back.

    Otherwise the profiler's many small records come to lie between the tensors, whose space then cannot be used again:
    the process grows to several times what it holds, and may meet its limit although the step itself does not.
    """
    give_memory_back()
    LIBC.mallopt(M_MMAP_THRESHOLD, 1 << 16)


def give_memory_back() -> None:
    """Give what malloc keeps of freed memory to the processes that measure meanwhile."""
    LIBC.malloc_trim(0)


def synchronize(device: str) -> None:
    """Wait for what the device still has to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def limit_memory(gibibytes: float) -> None:
    """Let allocations fail beyond so much more than the process has now, before the machine runs out of memory."""
    with open("/proc/self/status") as status:
        (now,) = (int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (now + int(gibibytes * 2**30),) * 2)


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an allocation has failed; the allocator of the CPU has no exception of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def main() -> None:
    """Serve one setting."""
    setting = Setting(**json.loads(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print must not come between the answers

    def answer(**values: Any) -> None:
        give_memory_back()
        answers.write(json.dumps(values) + "\n")

    torch.set_num_threads(setting.threads)
    try:
        if setting.memory_limit is not None and setting.device == "cpu":
            limit_memory(setting.memory_limit)
        if setting.time_limit is not None and setting.device == "cpu":
            resource.setrlimit(resource.RLIMIT_CPU, (setting.time_limit, resource.RLIM_INFINITY))
        method = build(setting)
        for weight in method.weights.values():
            weight.grad = torch.zeros_like(weight)
        loss = method.step().item()
        gradients = [weight.grad for weight in method.weights.values() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        answer(loss=loss, gradient_norm=norm, flops=method.flops)
        for request in sys.stdin:
            if request.strip() == "time":
                answer(seconds=seconds(method.step, setting.device))
            else:
                unpack_heap()
                answer(peak_bytes=peak_bytes(method.step, setting.device))
    except Exception as error:
        answer(error="out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}")
        if not is_out_of_memory(error):
            raise


if __name__ == "__main__":
    main()
