"""A run on a terminal: how far it is, how well it goes, on which nodes, and what its evaluations found."""

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
from ebwm_dist.cluster.run_status import Record, View, energy_gap, read_view
from ebwm_dist.errors import UserError
from ebwm_dist.training.metrics import duration, si

REFRESH = 0.5
"""Looks at the run folder a second."""
SILENT = 120.0
"""Seconds without a record after which a run is said to be silent."""
_SPARKS = "▁▂▃▄▅▆▇█"
_EVALUATIONS, _EVENTS = 8, 5


def frame(view: View) -> RenderableType:
    """Return all that is known of a run, as one picture."""
    parts: list[RenderableType] = [_progress(view), _figures(view)]
    if view.evaluations:
        parts.append(_evaluations(view.evaluations[-_EVALUATIONS:]))
    if view.nodes is not None:
        parts.append(_nodes(view.nodes, view.time))
    if view.events:
        parts.append(_events(view))
    return Panel(Group(*parts), title=f"{view.run_dir}", subtitle=state(view), title_align="left")


def live(run_dir: Path, console: Console, screen: bool = False) -> Live:
    """Return a frame that follows the run inside its `with` block; what is printed on `console` goes above it.

    Raises:
        UserError: `run_dir` is no run folder.
    """
    view = read_view(run_dir)

    def look() -> RenderableType:
        nonlocal view
        with suppress(UserError):  # its files may be written in this moment
            view = read_view(run_dir)
        return frame(view)

    return Live(look(), get_renderable=look, console=console, screen=screen, refresh_per_second=REFRESH)


def state(view: View) -> str:
    """Return in some words whether the run goes on."""
    if view.finished:
        return "finished"
    if view.events and view.events[-1]["event"] in ("end", "stop"):
        return f"stopped: {view.events[-1].get('reason', '')}"
    if view.silent is None:
        return "no step yet"
    age = f"last record {duration(view.silent)} ago"
    return f"SILENT, {age}" if view.silent > SILENT else age


def sparks(values: Sequence[float], width: int) -> str:
    """Return the course of some numbers in `width` characters, each a mean over its share of them."""
    if not values:
        return ""
    width = min(width, len(values))
    shares = [values[len(values) * i // width : len(values) * (i + 1) // width] for i in range(width)]
    means = [sum(share) / len(share) for share in shares]
    low, high = min(means), max(means)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((mean - low) * scale)] for mean in means)


def _progress(view: View) -> RenderableType:
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column()
    grid.add_column(ratio=1)
    grid.add_column()
    left = "" if view.seconds_left is None or view.finished else f"{duration(view.seconds_left)} left"
    grid.add_row(f"step {view.step}/{view.last_step}", ProgressBar(view.last_step, view.step), left)
    return grid


def _figures(view: View) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    if view.train:
        last = view.train[-1]
        losses = [record["loss"] for record in view.train if record["loss"] is not None]
        grid.add_row("loss", f"{_number(last['loss'])}  {sparks(losses, 40)}")
        if (gap := energy_gap(last)) is not None:
            gaps = [value for record in view.train if (value := energy_gap(record)) is not None]
            grid.add_row("energy gap", f"{_number(gap)}  {sparks(gaps, 40)}")
        unit = "tokens" if view.config.model.embedding_dim is None else "frames"
        memory = f"{last['peak_memory_bytes'] / 2**30:.2f} GiB"
        speed = f"{si(last['tokens_per_second'])} {unit}/s, MFU {100 * last['mfu']:.1f} %, {memory}"
        grid.add_row("throughput", f"{speed}, waiting for data {100 * last['data_wait']:.1f} %")
        grid.add_row("optimizer", f"gradient norm {_number(last['grad_norm'])}, learning rate {last['lr']:.2e}")
    if view.val is not None:
        extra = f", perplexity {view.val['perplexity']:.2f}" if view.val.get("perplexity") else ""
        grid.add_row("validation", f"{_number(view.val['loss_last_step'])} at step {view.val['step']}{extra}")
    saved = ", ".join(map(str, view.checkpoints[:_EVALUATIONS])) or "none yet"
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


def _events(view: View) -> RenderableType:
    title = f"{view.restarts} restart{'s' * (view.restarts != 1)}"
    table = Table("time", "event", "step", "what", title=title, title_justify="left")
    for event in view.events[-_EVENTS:]:
        what = event.get("reason") or f"{event.get('world_size', '?')} workers on {event.get('nodes', '?')} nodes"
        when = time.strftime("%d %b %H:%M:%S", time.localtime(event["time"]))
        style = "red" if event["event"] == "failure" else ""
        table.add_row(when, Text(event["event"], style=style), str(event.get("step", "")), Text(what))
    return table


def _number(value: Any, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
