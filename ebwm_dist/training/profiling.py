"""A trace of some training steps by torch's profiler, and a table of where their time goes.

While the profiler runs, methods of a step are replaced by ones that name their time in the trace; at all other times
nothing is left of it. The table is made of the file, which alone links kernels with their launches: each moment of a
step counts for the innermost name around it, and each kernel of a GPU for the name around its launch, whichever thread
has launched it.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from ebwm_dist.config.schema import Config
from ebwm_dist.distributed import World
from ebwm_dist.encoders.preprocessing import FramePreprocessor
from ebwm_dist.files import replacing
from ebwm_dist.training.engine import TrainingEngine

FOLDER = "profile"
_STEP, _REST, _BETWEEN = "step", "other", "between steps"
_PREFIX = "ebwm:"
_WARM_STEPS = 2
_HISTORY = 100_000
_BLOCK = 1 << 20
_COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "reduce",
    "reduce_scatter_tensor",
)
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")

Range = tuple[Any, str, str]
"""An object, the name of one of its methods, and what the time in it is called."""


class Profile:
    """Traces the steps that `profile.start` and `profile.steps` name.

    Args:
        config: of the whole run.
        world: this process and the others.
        first: the step that this start begins with.
        ranges: what to name in a step; objects and methods that are not there are left out.
        log: gets the table.
        progress: called on every rank while traces are written, as long as that goes on.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        first: int,
        ranges: Iterable[Range],
        log: Callable[[str], None],
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.world, self.log, self._ranges, self._progress = world, log, list(ranges), progress
        self._folder = Path(config.run_dir) / FOLDER
        start, steps = config.profile.start or first + _WARM_STEPS, config.profile.steps
        self._steps = range(start, start + steps)
        self._traces = world.rank == 0 or config.profile.ranks == "all"
        last = config.training.last_step
        if self._traces and steps and first <= last and (start > last or start + steps <= first):
            log(f"no step is traced: profile.start is {start}, and this start does the steps {first} to {last}")
        self._done: list[int] = []
        self._profiler: profile | None = None
        self._patches = ExitStack()
        self._written = 0

    def step(self, number: int) -> AbstractContextManager[None]:
        """Return what a step is done inside of, on all ranks."""
        return self._traced(number) if number in self._steps else nullcontext()

    def close(self) -> None:
        """Write what was traced, and the table, unless that is done already; a run may end before the last step.

        The other ranks may be gone.
        """
        self._close(lambda state: [state])

    def _close(self, gather: Callable[[tuple[bool, int]], list[tuple[bool, int]]]) -> None:
        """Write beside this thread: as long as something is written anywhere, all ranks are making progress."""
        profiler, self._profiler = self._profiler, None
        self._patches.close()
        if profiler is not None:
            profiler.stop()
        with ThreadPoolExecutor(1) as thread:
            writes = [thread.submit(self._write, profiler)] if profiler is not None and self._done else []
            before: list[tuple[bool, int]] = []
            while True:
                running = bool(wait(writes, 0.2).not_done)
                now = gather((running, self._written))
                if not any(running for running, _ in now):
                    break
                if now != before:
                    self._progress()
                before = now
            for write in writes:
                try:
                    self.log(write.result())
                except (OSError, RuntimeError, ValueError) as error:  # of a full disk, say: the training goes on
                    self.log(f"the profile could not be written: {error}")

    def _write(self, profiler: profile) -> str:
        """Write the trace; return the table."""
        steps = f"{self._done[0]}" if len(self._done) == 1 else f"{self._done[0]}-{self._done[-1]}"
        name = f"steps_{steps}_rank_{self.world.rank:05d}"
        path, plain = self._folder / f"{name}.json.gz", self._folder / f".{name}.json"
        if self.world.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        try:
            profiler.export_chrome_trace(str(plain))
            with open(plain, "rb") as whole, replacing(path) as file, gzip.open(file, "wb", compresslevel=3) as packed:
                while block := whole.read(_BLOCK):
                    packed.write(block)
                    self._written += 1
            events = json.loads(plain.read_bytes())["traceEvents"]
        finally:
            plain.unlink(missing_ok=True)
        lines = table(events, len(self._done))
        return "\n".join([f"profile of step {steps}, rank {self.world.rank}, in {path}:", *lines])

    @contextmanager
    def _traced(self, number: int) -> Iterator[None]:
        cuda = self.world.device.type == "cuda"
        if self._traces and self._profiler is None:
            self._folder.mkdir(exist_ok=True)
            for owner, method, name in [*self._ranges, *((dist, name, "communication") for name in _COLLECTIVES)]:
                _name_calls(owner, method, name, self._patches)
            if cuda:
                torch.cuda.memory._record_memory_history(max_entries=_HISTORY)
            self._profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])
            self._profiler.start()
        with record_function(_PREFIX + _STEP):
            yield
            if cuda:
                torch.cuda.synchronize()
        self._done.append(number)
        if number == self._steps[-1]:
            self._close(self.world.gather_objects)


def step_ranges(config: Config, engine: TrainingEngine, preprocess: FramePreprocessor) -> Iterator[Range]:
    """Yield the parts of a training step; work with a vocabulary is in calls of one module, inside of some passes."""
    model, space = engine.module, getattr(engine.module, "space", None)
    yield preprocess, "augment", "data"
    yield model, "context_stream", "context"
    yield model, "descend", "candidate"
    yield model, "tangent", "tangent"
    yield model, "summed_loss", "forward"
    yield space, "step", "update"
    yield space, "step_with_loss", "update"
    yield engine, "backward", "backward"
    yield engine, "step", "optimizer"
    if config.model.embedding_dim is None:
        for owner, module in ((space, "embeddings"), (space, "vocab_to_embed"), (model, "embeddings"), (model, "head")):
            yield getattr(owner, module, None), "forward", "vocabulary"


def _name_calls(owner: Any, method: str, name: str, patches: ExitStack) -> None:
    """Name the time in a method in the trace, until `patches` is closed."""
    function = getattr(owner, method, None)
    if function is None:
        return

    @wraps(function)
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(_PREFIX + name):
            return function(*args, **kwargs)

    if method in vars(owner):
        patches.callback(setattr, owner, method, function)
    else:
        patches.callback(delattr, owner, method)
    setattr(owner, method, named)


class Times(NamedTuple):
    """Seconds by name."""

    cpu: dict[str, float]
    """Of the thread that trains; they add up to the steps."""
    gpu: dict[str, float]
    """Of kernels; empty without a GPU."""


def times_of(events: Sequence[dict[str, Any]]) -> Times:
    """Divide the time of the traced steps of one process, the events of a chrome trace, by names."""
    # What the GPU was busy with is there once more as ranges of its own.
    spans = [event for event in events if event.get("ph") == "X" and event.get("cat") != "gpu_user_annotation"]
    thread = next(event["tid"] for event in spans if event["name"] == _PREFIX + _STEP)
    named = [(event["ts"], -event["dur"], name) for event in spans if event["tid"] == thread and (name := _name(event))]
    cpu: dict[str, float] = defaultdict(float)
    starts, names = [float("-inf")], [_REST]
    stack: list[tuple[float, str]] = []

    def leave(until: float) -> None:
        while stack and stack[-1][0] <= until:
            starts.append(stack.pop()[0])
            names.append(stack[-1][1] if stack else _BETWEEN)

    for start, minus_duration, name in sorted(named):  # of two that start together, the outer one is longer
        leave(start)
        if not stack and name != _REST:  # of a validation or a save after a step
            continue
        cpu[name] -= minus_duration / 1e6
        if stack:
            cpu[stack[-1][1]] += minus_duration / 1e6
        stack.append((start - minus_duration, name))
        starts.append(start)
        names.append(name)
    leave(float("inf"))
    launched = {_correlation(event): event["ts"] for event in spans if event.get("cat") in _LAUNCHES}
    gpu: dict[str, float] = defaultdict(float)
    for event in spans:
        if event.get("cat") in _KERNELS:
            name = names[bisect_right(starts, launched.get(_correlation(event), float("-inf"))) - 1]
            if name != _BETWEEN:
                gpu["communication" if event["name"].startswith("nccl") else name] += event["dur"] / 1e6
    return Times(dict(cpu), dict(gpu))


def table(events: Sequence[dict[str, Any]], steps: int) -> list[str]:
    """Return lines: of each part of a step its time on the CPU and on the GPU, and the share of the step."""
    cpu, gpu = times_of(events)
    total = sum(cpu.values())
    units = ("CPU", "GPU") if gpu else ("CPU",)
    lines = ["  " + " " * 14 + "".join(f"{f's a step ({unit})':>18}{'share':>8}" for unit in units)]
    order = sorted(cpu.keys() | gpu.keys(), key=lambda name: -(gpu or cpu).get(name, 0.0))
    for name, *parts in [*((name, cpu, gpu) for name in order), ("all", {"all": total}, {"all": sum(gpu.values())})]:
        cells = (part.get(name, 0.0) for part in parts[: len(units)])
        lines.append(f"  {name:14}" + "".join(f"{value / steps:18.4f}{100 * value / total:7.1f}%" for value in cells))
    return lines


def _name(event: dict[str, Any]) -> str | None:
    """Return what the time of an event counts as, if it has a name."""
    name: str = event["name"]
    if name.startswith(_PREFIX):
        return _REST if name == _PREFIX + _STEP else name.removeprefix(_PREFIX)
    if name.startswith("c10d::"):
        return "communication"
    return "vocabulary" if name == "_EmbedStateBackward" else None


def _correlation(event: dict[str, Any]) -> Any:
    return event.get("args", {}).get("correlation")
