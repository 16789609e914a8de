"""A thread that writes a rank's part of a checkpoint, and the copies in memory that it writes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ebwm_dist.checkpoint import writing
from ebwm_dist.checkpoint.host_memory import HostMemory
from tests.runs import assert_same


def test_a_rank_that_dies_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 has written its part, and waits for the others as long as their files grow."""
    monkeypatch.setattr(writing, "_PATIENCE", 0.5)
    (staging := tmp_path / "step-000001.tmp").mkdir()
    save = writing.Save(staging, {"mine.pt": 1}, 0, 2, lambda shares: pytest.fail("committed"))
    save.start()
    for size in range(12):
        (staging / "theirs.pt").write_bytes(bytes(size))
        time.sleep(0.1)
    assert save.is_alive()
    beats: list[None] = []
    save.settle(lambda: beats.append(None))
    assert not save.is_alive() and isinstance(save.failure, InterruptedError) and beats


def test_ranks_agree_by_files(tmp_path: Path) -> None:
    shares: list[Any] = []
    (staging := tmp_path / "step-000001.tmp").mkdir()
    saves = [writing.Save(staging, {f"{rank}.pt": rank}, rank, 3, shares.extend) for rank in range(3)]
    for save in saves:
        save.start()
    for save in saves:
        save.join(20)
        assert save.failure is None and not save.is_alive()
    assert [list(share) for share in shares] == [["0.pt"], ["1.pt"], ["2.pt"]]
    assert {path.name for path in staging.iterdir()} == {"0.pt", "1.pt", "2.pt"}


def test_a_copy_is_exact_and_reuses_its_memory() -> None:
    """Tensors that share memory do so in the copy; what the next save overwrites is the copy of the one before."""
    base = torch.arange(12.0)
    content = {
        "all": base,
        "part": base[3:7],
        "view": base.view(3, 4).t(),
        "parameter": nn.Parameter(torch.ones(2), requires_grad=False),
        "wanted": torch.ones(3, requires_grad=True),
        "empty": torch.empty(0, dtype=torch.bfloat16),
        "plain": (1, "two", [3.0, None, torch.Size([4])]),
    }
    memory = HostMemory(pinned=False)
    copies = memory.copy(content)
    assert_same(copies, content)
    assert copies["part"].untyped_storage().data_ptr() == copies["all"].untyped_storage().data_ptr()
    assert copies["view"].stride() == (1, 4) and copies["wanted"].requires_grad
    base.zero_()
    assert copies["all"].sum() == 66 and copies["part"].sum() == 18
    again = memory.copy(content)
    assert again["all"].data_ptr() != copies["all"].data_ptr()
    memory.recycle()
    later = memory.copy(content)
    assert later["all"].data_ptr() in (again["all"].data_ptr(), copies["all"].data_ptr())
    assert_same(later, content)
