"""How far trials are: a table that is redrawn on a terminal, elsewhere a line for each that starts or ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ebwm_dist.cluster.run_status import tail
from ebwm_dist.config.schema import Config
from ebwm_dist.experiments.trial import Trial, final_validation
from ebwm_dist.files import METRICS_FILE
from ebwm_dist.training.metrics import duration

if TYPE_CHECKING:
    from ebwm_dist.experiments.runner import Outcome

_REFRESH = 1.0


class Progress:
    """Shows trials while its `with` block runs; `kept` are finished from the beginning."""

    def __init__(self, configs: Mapping[Trial, Config], kept: Mapping[Trial, Outcome]) -> None:
        self._configs, self._total = configs, len(configs)
        self._kept, self._ended, self._failed = len(kept), len(kept), 0
        self._since: dict[Trial, float] = {}
        self._begin = self._drawn = time.monotonic()
        console = Console()
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._kept:
            self._line(f"{self._kept} of {self._total} runs are finished already")
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def started(self, trial: Trial) -> None:
        """Note a trial that begins."""
        self._since[trial] = time.monotonic()
        if self._live is None:
            self._line(f"{trial.name}: started, step {self._step(trial)} of {self._configs[trial].training.last_step}")

    def ended(self, outcome: Outcome) -> None:
        """Note a trial that has ended; a failure is told on stderr."""
        self._ended += 1
        took = duration(time.monotonic() - self._since.pop(outcome.trial))
        begin = f"[{self._ended}/{self._total}] {outcome.trial.name}: {outcome.state}"
        if outcome.reason:
            self._failed += 1
            self._line(f"{begin} after {took}: {outcome.reason}", failure=True)
            return
        record = final_validation(outcome.config)
        loss = "" if record is None else f", validation loss {record['loss_last_step']:.4f}"
        self._line(f"{begin} in {took}{loss}")

    def refresh(self) -> None:
        """Redraw the table, on a terminal, about once a second."""
        if self._live is not None and time.monotonic() - self._drawn >= _REFRESH:
            self._drawn = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def _table(self) -> Group:
        waiting = self._total - self._ended - len(self._since)
        table = Table("run", "step", "loss", "time", box=None)
        for trial, since in self._since.items():
            config = self._configs[trial]
            records = [one for one in tail(Path(config.run_dir) / METRICS_FILE)[0] if one.get("kind") == "train"]
            loss = f"{records[-1]['loss']:.4f}" if records and records[-1]["loss"] is not None else ""
            step = f"{records[-1]['step'] if records else 0} / {config.training.last_step}"
            table.add_row(trial.name, step, loss, duration(time.monotonic() - since))
        took = duration(time.monotonic() - self._begin)
        counts = f"{self._ended} of {self._total} ended, {self._failed} failed, {waiting} waiting, {took}"
        return Group(table, Text(counts))

    def _step(self, trial: Trial) -> int:
        records, _ = tail(Path(self._configs[trial].run_dir) / METRICS_FILE)
        return int(records[-1]["step"]) if records else 0

    def _line(self, text: str, failure: bool = False) -> None:
        if self._live is not None:
            self._live.console.print(Text(text, style="red" if failure else ""))
        else:
            print(text, file=sys.stderr if failure else sys.stdout, flush=True)
