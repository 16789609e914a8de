from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebwm_dist.workers.pool import Pool, connected


def test_a_long_temporary_folder_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray's sockets lie in it, and the path of a socket has 107 bytes at most."""
    folder = tmp_path / ("x" * (103 - len(str(tmp_path))))
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with connected(1):
        pool = Pool(1)
        assert list(pool.map(os.path.join, [("a", "b")])) == ["a/b"]
        pool.close()
    assert f"{folder} is too long for Ray's sockets; using /tmp/ray" in capsys.readouterr().out


PRINTS = """
import time
import ray
from ebwm_dist.workers.pool import connected

with connected(1):
    ray.get(ray.remote(lambda: print("from a worker", flush=True)).remote())
    time.sleep(3)  # output of workers arrives later
"""


@pytest.mark.slow
def test_what_workers_print_has_no_colours_beside_a_terminal() -> None:
    done = subprocess.run([sys.executable, "-c", PRINTS], capture_output=True, text=True, check=True)
    assert "from a worker" in done.stdout + done.stderr and "\x1b" not in done.stdout + done.stderr
