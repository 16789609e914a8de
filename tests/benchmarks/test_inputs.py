"""The benchmark of input formats compares files that hold the same documents."""

from __future__ import annotations

from pathlib import Path

from benchmarks.inputs import write
from ebwm_dist.prepare.document_reader import DocumentReader, find_documents


def test_every_format_holds_the_same_documents(tmp_path: Path) -> None:
    paths = write(tmp_path, megabytes=0.1, row_group=4)
    found = [[(d.id, d.group, d.text) for d in DocumentReader(find_documents([path]))] for path in paths.values()]
    assert found[0] == found[1] == found[2] and sum(len(text) for _, _, text in found[0]) > 1e5
