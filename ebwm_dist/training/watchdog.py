"""End a rank that makes no progress, with one line that names the step and the ranks at fault.

Once a second a thread of each rank publishes its step and phase in the key-value store of the process group. Reports
of a stopped or dead process end, and those of a process that hangs in Python repeat the same place. The process of
rank 0 (or torchrun) serves the store and may itself hang, so the store is only accessed from threads, and waited for
with a limit.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from types import FrameType
from typing import Any

import torch.distributed as dist

from ebwm_dist.distributed import World
from ebwm_dist.rendezvous import Store

EXIT_CODE = 75
"""Exit code of a rank ended by its watchdog (EX_TEMPFAIL: starting again may help)."""
_INTERVAL = 1.0
_STORE_PATIENCE = 3.0
_TIME_TO_LEAVE = 60.0
_NAMED_RANKS = 8
_LIBRARIES = {"torch", "deepspeed"} | sys.stdlib_module_names - {"__main__"}

Report = dict[str, Any]
"""State of a rank: `beat, time, host, step, phase, count` (of phases in the step), `place, in_collective`, and after
its end the reason, `end`, and its own verdict if other ranks caused it, `blames`."""


def heartbeat_store() -> Store | None:
    """Return a connection of its own to the process group's store, or None without one.

    Calls on one connection queue behind each other, and collectives must not queue behind a heartbeat.
    """
    try:
        default: Store = dist.distributed_c10d._get_default_store()
        return dist.distributed_c10d.PrefixStore("ebwm_heartbeat", default.clone())
    except (AttributeError, RuntimeError, ValueError):  # private names of torch; no process group
        return None


def is_communication_error(error: BaseException) -> bool:
    """Return whether `error` comes from a collective, whose cause is then likely on another rank."""
    signs = r"gloo|NCCL|Connection (closed|reset)|Timed out waiting|Broken pipe"
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and re.search(signs, str(error)) is not None
    )


class Watchdog:
    """Watches this rank, and explains a failure by the last reports of the others.

    Args:
        world: this process and the others.
        store: of `heartbeat_store`; None leaves the other ranks out.
        startup_timeout: seconds without progress until the first step is done.
        step_timeout: seconds without progress afterwards.
        on_timeout: called with the reason before this process is ended.
        outage: returns the reason why data are waited for, if the network is away.
    """

    def __init__(
        self,
        world: World,
        store: Store | None,
        startup_timeout: float,
        step_timeout: float,
        on_timeout: Callable[[str], None] = lambda reason: None,
        outage: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.world, self._on_timeout, self._outage = world, on_timeout, outage
        self.store = store if world.world_size > 1 else None
        self.step_timeout = step_timeout
        self._timeout = startup_timeout
        self._limit_key = "training.startup_timeout"
        self._silence = 0.0
        self._saving: Callable[[], tuple[int | None, int] | None] = lambda: None
        self._beats = 0
        self._report: Report = {"step": 0, "count": 0, "phase": "starting", "host": world.node}
        self._report |= {"end": None, "blames": None}
        self._trainer_thread = threading.get_ident()
        self._closed = threading.Event()
        self._moved = threading.Event()
        self._giving_up = False
        self._publish()
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._watcher.start()
        if self.store is not None:
            threading.Thread(target=self._publish_repeatedly, name="heartbeat", daemon=True).start()

    def beat(self, step: int, phase: str) -> None:
        """Report that this rank is at `phase` of `step`; all ranks go through the same phases.

        The same phase again only shows that there is progress.
        """
        before = self._report
        if (step, phase) != (before["step"], before["phase"]):
            count = before["count"] + 1 if step == before["step"] else 0
            self._report = {**before, "step": step, "phase": phase, "count": count}
            self._moved.set()
        self._trainer_thread = threading.get_ident()
        self._silence = 0.0

    def first_step_done(self) -> None:
        """Replace the start-up timeout by the one for steps."""
        self._timeout, self._limit_key = self.step_timeout, "training.step_timeout"
        self._silence = 0.0

    def watch_save(self, activity: Callable[[], tuple[int | None, int] | None]) -> None:
        """Also watch a thread that writes checkpoints: `activity` returns it and a number that grows, or None."""
        self._saving = activity

    def explain(self, error: BaseException) -> str:
        """Return one line on an `error` of a collective: the step, and the rank that has caused it."""
        if self._giving_up:
            self._watcher.join()  # the same news is about to be printed, and the process ended
        self._silence, self._timeout = 0.0, _TIME_TO_LEAVE
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]
        where = {**self._report, "place": _place(frames)[0]}
        verdict = self._verdict()
        self._publish_end("it lost the other ranks", verdict)
        self._wait_for_readers()
        return f"{self._here()}: lost the other ranks in {_point(where)}: {_reason(error)}. {verdict}"

    def close(self, failure: str | None = None) -> None:
        """Stop watching; the other ranks will name `failure` as the reason for the end of this one."""
        self._closed.set()
        self._moved.set()
        self._publish_end(failure or "it has finished")
        if threading.current_thread() is not self._watcher:
            self._watcher.join(_STORE_PATIENCE)

    def _watch(self) -> None:
        last, save, save_silence = time.monotonic(), self._saving(), 0.0
        tick = min(_INTERVAL, self.step_timeout / 10)
        while not self._closed.wait(tick):
            now = time.monotonic()
            # A longer gap is a stop of this very process (Ctrl-Z, say), which is no lack of progress.
            gap = min(now - last, 2 * tick)
            self._silence += gap
            last, before, save = now, save, self._saving()
            save_silence = save_silence + gap if save == before and save is not None else 0.0
            if self._silence > self._timeout:
                self._giving_up = True
                where, outage = _point(self._current()), self._outage()
                cause = f": {outage}" if outage else ""
                self._give_up(self._silence, f"{where}{cause}", f"it made no progress{cause}", self._verdict())
            elif save is not None and save_silence > self._timeout:
                self._giving_up = True
                place = {"phase": "checkpoint, beside the training", "place": _place(_stack(save[0]))[0]}
                self._give_up(save_silence, _point({**self._report, **place}), "it could not write a checkpoint", None)

    def _give_up(self, silence: float, where: str, end: str, verdict: str | None) -> None:
        reason = f"{self._here()}: no progress for {silence:.0f} s in {where}. {verdict or self._advice()}"
        print(reason, file=sys.stderr, flush=True)
        self._on_timeout(reason)
        self._publish_end(end, verdict)
        self._wait_for_readers()
        sys.stdout.flush()
        os._exit(EXIT_CODE)

    def _wait_for_readers(self) -> None:
        # The store ends with rank 0, and the others may be about to find out from it what has happened.
        if self.world.rank == 0 and self.store is not None:
            time.sleep(2 * _STORE_PATIENCE)

    def _here(self) -> str:
        return f"rank {self.world.rank} ({self.world.node})"

    def _current(self) -> Report:
        place, in_collective = _place(_stack(self._trainer_thread))
        return {**self._report, "place": place, "in_collective": in_collective}

    def _advice(self) -> str:
        return f"If it may take this long, raise {self._limit_key}."

    def _verdict(self) -> str:
        advice = self._advice()
        if self.store is None:
            return advice
        first, second = self._read(), None
        if first is not None:
            time.sleep(_STORE_PATIENCE)
            second = self._read()
        if first is None or second is None:
            self.store = None
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                return "The store of torchrun does not answer: it was stopped or has ended."
            host = os.environ.get("MASTER_ADDR", socket.gethostname())
            return f"Rank 0 ({host}) does not answer: its process was stopped or has ended; see what it printed last."
        reports: dict[int, Report | None] = {rank: second.get(rank) for rank in range(self.world.world_size)}
        reports[self.world.rank] = {**self._current(), "beat": -1}
        return diagnose(reports, first) or f"All ranks are at the same point. {advice}"

    def _read(self) -> dict[int, Report] | None:
        """Return what the ranks have published, or None if the store does not answer."""
        result: dict[int, Report] = {}
        done = threading.Event()

        def read(store: Store) -> None:
            ranks = [rank for rank in range(self.world.world_size) if store.check([str(rank)])]
            values = store.multi_get([str(rank) for rank in ranks])
            result.update({rank: json.loads(value) for rank, value in zip(ranks, values, strict=True)})
            done.set()

        assert self.store is not None
        _start(read, self.store)
        return result if done.wait(_STORE_PATIENCE) else None

    def _publish_repeatedly(self) -> None:
        while self._report["end"] is None:
            try:
                self._publish()
            except (RuntimeError, OSError):  # the store has gone; `_verdict` will say so
                return
            self._closed.wait(_INTERVAL / 10)  # at most this often
            self._moved.wait(_INTERVAL)
            self._moved.clear()

    def _publish_end(self, end: str, blames: str | None = None) -> None:
        self._report = {**self._report, "end": end, "blames": blames}
        if self.store is not None:
            _start(lambda store: self._publish(), self.store).join(_STORE_PATIENCE)

    def _publish(self) -> None:
        if self.store is None:
            return
        self._beats += 1
        self.store.set(str(self.world.rank), json.dumps({**self._current(), "beat": self._beats, "time": time.time()}))


def diagnose(reports: Mapping[int, Report | None], earlier: Mapping[int, Report]) -> str:
    """Name the ranks that keep the others waiting, given the reports of all and those of some seconds `earlier`.

    Return nothing if all of them are at the same point.
    """
    live: dict[int, Report] = {}
    gone: list[str] = []
    witnesses: list[str] = []
    for rank, report in reports.items():
        if report is None:
            gone.append(f"Rank {rank} has never reported.")
        elif report["blames"] is not None:
            witnesses.append(report["blames"])
        elif report["end"] is not None:
            gone.append(f"{_name(rank, report)} ended in {_point(report)}: {report['end']}.")
        elif rank in earlier and report["beat"] == earlier[rank]["beat"]:
            silent = f"last heard {max(0, time.time() - report['time']):.0f} s ago"
            gone.append(f"{_name(rank, report)} stopped responding in {_point(report)}, {silent}.")
        else:
            live[rank] = report
    if gone or witnesses:
        return _some(gone or witnesses[:1])
    furthest = max((report["step"], report["count"]) for report in live.values())
    behind = {rank: report for rank, report in live.items() if (report["step"], report["count"]) < furthest}
    if behind:
        return _some([f"{_name(rank, report)} is behind, in {_point(report)}." for rank, report in behind.items()])
    absent = {rank: report for rank, report in live.items() if not report["in_collective"]}
    if len(absent) < len(live):
        return _some([f"{_name(rank, it)} keeps the others waiting, in {_point(it)}." for rank, it in absent.items()])
    return ""


def _some(sentences: list[str]) -> str:
    rest = len(sentences) - _NAMED_RANKS
    return " ".join(sentences[:_NAMED_RANKS] + ([f"And {rest} more."] if rest > 0 else []))


def _name(rank: int, report: Report) -> str:
    return f"Rank {rank} ({report['host']})"


def _point(report: Report) -> str:
    return f"step {report['step']} (phase {report['phase']}, {report['place']})"


def _stack(thread: int | None) -> Iterator[FrameType]:
    frame = sys._current_frames().get(thread or 0)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _place(frames: Iterable[FrameType]) -> tuple[str, bool]:
    """Return the innermost line that is not a library's, and whether it waits for a collective."""
    in_collective = False
    for frame in frames:
        module = frame.f_globals.get("__name__", "")
        in_collective = in_collective or module.startswith("torch.distributed")
        if module != __name__ and module.partition(".")[0] not in _LIBRARIES:
            return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}", in_collective
    return "at an unknown line", in_collective


def _reason(error: BaseException) -> str:
    """Return the first sentence of an error without the place in torch's sources that it starts with."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+\] ", "", text).split(". ")[0].rstrip(".")


def _start(function: Any, store: Store) -> threading.Thread:
    def run() -> None:
        with suppress(RuntimeError, OSError):  # the store has gone
            function(store)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread
