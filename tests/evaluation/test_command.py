"""The command reads its files before anything else, and reports errors in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from ebwm_dist.distributed import World
from ebwm_dist.errors import DataError, UserError
from ebwm_dist.evaluation.multiple_choice import Question, read_questions
from ebwm_dist.evaluation.suite import Suite
from launchers.evaluate import main
from tests.made_runs import finished_run
from tests.runs import write_config
from tests.tiny_data import make_tiny_data

LINE = json.dumps({"context": "a", "choices": ["b", "c"], "answer": 1})


def test_what_json_and_utf8_allow_is_read(tmp_path: Path) -> None:
    """A byte order mark, line separators inside of a text, Windows' line ends, blank lines."""
    odd = json.dumps({"context": "a\u2028b\x85", "choices": ["\x0b", "é"], "answer": 0}, ensure_ascii=False)
    (tmp_path / "q").write_bytes(f"\ufeff{LINE}\r\n\n{odd}\n  \n".encode())
    assert read_questions(tmp_path / "q") == [Question("a", ("b", "c"), 1), Question("a\u2028b\x85", ("\x0b", "é"), 0)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINE.replace("1", "2"), "line 1: expected .*answer = 2 is not an index"),
        (LINE.replace("1", "-1"), "answer = -1 is not an index"),
        (LINE.replace("1", "true"), "answer = True is not an index"),
        (LINE.replace("1", "1.0"), "answer = 1.0 is not an index"),
        (LINE.replace('"c"', "3"), "not all of them are texts"),
        (LINE.replace(', "c"', ""), "fewer than two"),
        (LINE.replace('["b", "c"]', '"bc"'), "choices are no list"),
        (LINE.replace("context", "text"), "no 'context'"),
        (f"{LINE}\n{LINE[:-1]}", "line 2: expected"),
        ("[]", "line 1: expected"),
        (LINE.replace('"a"', '"\\ud800"'), "surrogates not allowed"),
        ("[" * 100_000, "line 1: expected"),
        ("", "holds no questions"),
        ("\n \n", "holds no questions"),
        (LINE.replace('"a"', '"\xe9"').encode("latin-1"), "cannot be read: not UTF-8 from byte 13 on"),
        (None, "cannot be read: No such file"),
    ],
)
def test_anything_else_is_one_line(content: str | bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "q").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        read_questions(tmp_path / "q")
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path / "q"))


def test_an_error_of_another_rank_is_reported_by_it(
    untrained: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that all ranks have is reported by the first alone."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("ebwm_dist.distributed.join", lambda: World(1, 1, 2, torch.device("cpu")))
    monkeypatch.setattr("ebwm_dist.evaluation.evaluate.evaluate_runs", fail)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--run", untrained])
    error = DataError("val-000000.tar is damaged")
    assert main() == 1 and capsys.readouterr().err == "error: val-000000.tar is damaged\n"
    error.same_on_all_ranks = True
    assert main() == 1 and not capsys.readouterr().err


@pytest.fixture
def untrained(tmp_path: Path) -> str:
    """A run folder that holds nothing but a configuration."""
    (tmp_path / "untrained").mkdir()
    (tmp_path / "untrained" / "config.yaml").touch()
    return str(tmp_path / "untrained")


@pytest.mark.parametrize("option", ["--choices", "--ood-text"])
def test_files_are_read_before_the_model(
    option: str, untrained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--run", untrained, option, str(tmp_path / "latin")])
    assert main() == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'latin'} cannot be read: not UTF-8 from byte 3 on\n"


def test_what_cannot_be_written_or_measured_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = make_tiny_data(tmp_path / "text", documents=40)
    finished_run(write_config(tmp_path), text, tmp_path / "run")
    (tmp_path / "file").touch()
    monkeypatch.setattr(Suite, "run", pytest.fail)
    arguments = ["evaluate.py", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "file" / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert main() == 1
    error = capsys.readouterr().err
    assert "Not a directory" in error and error.count("\n") == 1
    (tmp_path / "short").write_text("ka")
    arguments[3:] = ["--ood-text", str(tmp_path / "short")]
    assert main() == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --ood-text has only ") and error.count("\n") == 1


def test_variables_that_a_launcher_has_left_are_one_line(
    untrained: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--run", untrained])
    assert main() == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the environment describes part of a distributed run, RANK, ")
    assert error.endswith("or unset RANK and WORLD_SIZE\n") and error.count("\n") == 1
