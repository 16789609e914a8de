"""A rank that hangs ends the whole command in the configured time."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.launchers.jobs import Start, steps_done

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_ends_the_command(start: Start, launch_arguments: list[str], tmp_path: Path, rank: int) -> None:
    """The launcher's own limit comes on top: it gives a rank that does not react to SIGTERM 30 seconds."""
    arguments = [*launch_arguments, "training.max_steps=1000", "training.step_timeout=8", f"run_dir={tmp_path / 'run'}"]
    job = start("torchrun", arguments)
    job.wait_until(lambda: steps_done(tmp_path / "run") >= 2, "step 2")
    os.kill(job.rank(rank), signal.SIGSTOP)
    assert job.end(seconds=8 + 12 + 30 + 30) != 0
    (told,) = re.findall(rf"(?m)^rank {1 - rank} \(.*\): no progress for .*$", job.text)
    assert re.search(rf"Rank {rank} \(.*\) stopped responding in step \d+ \(phase ", told), told
