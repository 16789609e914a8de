"""The benchmark of encoding compares ways that give the same ids."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import encoding
from ebwm_dist.data.tokenizer.json_file import JsonTokenizer

TINY = ["encoding.py", "--json", "--megabytes", "0.02", "--vocab", "400", "--repeats", "1"]


def test_every_way_is_timed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", TINY)
    assert encoding.main() == 0
    for found in json.loads(capsys.readouterr().out)["kinds"].values():
        rates = found["megabytes_per_second"]
        assert found["ratio"] == rates.pop("here") / max(rates.values()) > 0


def test_ways_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", TINY)
    monkeypatch.setattr(JsonTokenizer, "encode_raw", lambda self, text, special: [5])
    with pytest.raises(SystemExit, match="gives other ids"):
        encoding.main()
