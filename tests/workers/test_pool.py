from __future__ import annotations

import os
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
