"""Show the status of a run on a terminal: progress, losses, speed, nodes, evaluations and events."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ebwm_dist.cluster.results import trained_loss
from ebwm_dist.cluster.run_status import RunStatus, energy_gap, read_status
from ebwm_dist.errors import UserError
from ebwm_dist.files import Record
from ebwm_dist.training.metrics import duration, si

REFRESH = 0.5
"""Updates per second."""
SILENT = 120.0
"""Seconds without a record after which a run is shown as silent."""
_SPARKS = "▁▂▃▄▅▆▇█"
_EVALUATIONS, _EVENTS = 8, 5


def frame(status: RunStatus) -> RenderableType:
    """Return the status of a run as one panel."""
    parts: list[RenderableType] = [_progress(status), _figures(status)]
    if status.evaluations:
        parts.append(_evaluations(status.evaluations[-_EVALUATIONS:]))
    if status.nodes is not None:
        parts.append(_nodes(status.nodes, status.time))
    if status.events:
        parts.append(_events(status))
    return Panel(Group(*parts), title=f"{status.run_dir}", subtitle=state(status), title_align="left")


def live(run_dir: Path, console: Console, screen: bool = False) -> Live:
    """Return a panel that follows the run inside its `with` block; `console` prints above it.

    Raises:
        UserError: `run_dir` is no run folder.
    """
    status = read_status(run_dir)

    def render() -> RenderableType:
        nonlocal status
        with suppress(UserError):  # its files may be written in this moment
            status = read_status(run_dir)
        return frame(status)

    return Live(render(), get_renderable=render, console=console, screen=screen, refresh_per_second=REFRESH)


def state(status: RunStatus) -> str:
    """Return whether the run is going on, in some words."""
    if status.finished:
        return "finished"
    if status.events and status.events[-1]["event"] in ("end", "stop"):
        return f"stopped: {status.events[-1].get('reason', '')}"
    if status.idle is None:
        return "no step yet"
    age = f"last record {duration(status.idle)} ago"
    return f"SILENT, {age}" if status.idle > SILENT else age


def sparks(values: Sequence[float], width: int) -> str:
    """Return a sparkline of `width` characters, each the mean of its share of `values`."""
    if not values:
        return ""
    width = min(width, len(values))
    shares = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [sum(share) / len(share) for share in shares]
    low, high = min(means), max(means)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((mean - low) * scale)] for mean in means)


def _progress(status: RunStatus) -> RenderableType:
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column()
    grid.add_column(ratio=1)
    grid.add_column()
    left = "" if status.seconds_left is None or status.finished else f"{duration(status.seconds_left)} left"
    grid.add_row(f"step {status.step}/{status.last_step}", ProgressBar(status.last_step, status.step), left)
    return grid


def _figures(status: RunStatus) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    if status.train:
        last = status.train[-1]
        losses = [record["loss"] for record in status.train if record["loss"] is not None]
        grid.add_row("loss", f"{_number(last['loss'])}  {sparks(losses, 40)}")
        if (gap := energy_gap(last)) is not None:
            gaps = [value for record in status.train if (value := energy_gap(record)) is not None]
            grid.add_row("energy gap", f"{_number(gap)}  {sparks(gaps, 40)}")
        unit = f"{status.config.model.unit}s"
        memory = f"{last['peak_memory_bytes'] / 2**30:.2f} GiB"
        mfu = f"MFU {100 * last['mfu']:.1f} %, " if last["mfu"] else ""  # null, or 0 in older runs
        speed = f"{si(last['tokens_per_second'])} {unit}/s, {mfu}{memory}"
        grid.add_row("throughput", f"{speed}, waiting for data {100 * last['data_wait']:.1f} %")
        grid.add_row("optimizer", f"gradient norm {_number(last['grad_norm'])}, learning rate {last['lr']:.2e}")
    if status.val is not None:
        extra = f", perplexity {status.val['perplexity']:.2f}" if status.val.get("perplexity") else ""
        grid.add_row("validation", f"{_number(status.val['loss_last_step'])} at step {status.val['step']}{extra}")
    saved = ", ".join(map(str, status.checkpoints[:_EVALUATIONS])) or "none yet"
    grid.add_row("checkpoints", saved)
    return grid


def _evaluations(records: Sequence[Record]) -> RenderableType:
    table = Table(
        "step", "loss", "lowest", "after steps", "perplexity", "lag", title="evaluations", title_justify="left"
    )
    for record in records:
        if "error" in record:
            table.add_row(str(record["step"]), Text(f"failed: {record['error'][:60]}", style="red"))
            continue
        numbered = [(loss, step + 1) for step, loss in enumerate(record["loss"]) if loss is not None]
        lowest, best = min(numbered, default=(None, 0))
        perplexity = record["perplexity"][record["trained_steps"] - 1] if "perplexity" in record else None
        cells = (_number(trained_loss(record)), _number(lowest), str(best), _number(perplexity, 2))
        table.add_row(str(record["step"]), *cells, f"{record['lag']:.1f} s")
    return table


def _nodes(seen: Record, now: float) -> RenderableType:
    age = f"seen {duration(max(0.0, now - seen['time']))} ago"
    table = Table("node", "state", "CPUs", "GPUs", title=f"nodes, {age}", title_justify="left")
    for node in sorted(seen["nodes"], key=lambda node: (not node["alive"], node["name"])):
        state = Text("alive", style="green") if node["alive"] else Text("DEAD", style="red")
        resources = node["resources"]
        table.add_row(node["name"], state, f"{resources.get('CPU', 0):g}", f"{resources.get('GPU', 0):g}")
    return table


def _events(status: RunStatus) -> RenderableType:
    title = f"{status.restarts} restart{'s' * (status.restarts != 1)}"
    table = Table("time", "event", "step", "what", title=title, title_justify="left")
    for event in status.events[-_EVENTS:]:
        what = event.get("reason") or f"{event.get('world_size', '?')} workers on {event.get('nodes', '?')} nodes"
        when = time.strftime("%d %b %H:%M:%S", time.localtime(event["time"]))
        style = "red" if event["event"] == "failure" else ""
        table.add_row(when, Text(event["event"], style=style), str(event.get("step", "")), Text(what))
    return table


def _number(value: Any, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
