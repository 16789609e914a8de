"""Files of questions: what may stand in them, and the one line about what may not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ebwm_dist.errors import UserError
from ebwm_dist.evaluation.multiple_choice import Question, read_questions
from launchers.evaluate import main

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


@pytest.mark.parametrize("option", ["--choices", "--ood-text"])
def test_files_are_read_before_the_model(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--run", "nowhere", option, str(tmp_path / "latin")])
    assert main() == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'latin'} cannot be read: not UTF-8 from byte 3 on\n"
