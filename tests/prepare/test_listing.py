"""Which files of a folder are inputs: linked ones, each once, nothing hidden, and no output of the tool itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ebwm_dist.errors import DataError, UserError
from ebwm_dist.prepare.listing import describe_inputs, list_inputs


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def names_of(*inputs: Path, outputs: tuple[Path, ...] = ()) -> list[str]:
    return [file.name for file in list_inputs(inputs, (".txt", ".jsonl.gz"), outputs)]


def test_folders_are_sorted_by_their_parts_and_suffixes_have_any_case(tmp_path: Path) -> None:
    make(tmp_path, "b.txt", "a/z.TXT", "a-b.Jsonl.GZ", "a/c/x.txt", "a.txt")
    assert names_of(tmp_path) == ["a/c/x.txt", "a/z.TXT", "a-b.Jsonl.GZ", "a.txt", "b.txt"]
    assert names_of(tmp_path / "b.txt", tmp_path / "a", tmp_path) == [
        *("b.txt", "c/x.txt", "z.TXT"),  # relative to the input that lists them first
        *("a-b.Jsonl.GZ", "a.txt"),
    ]


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "real/x.txt", "loose.txt")
    make(tmp_path / "elsewhere", "deep/y.txt", "z.txt")
    (folder / "alias").symlink_to(folder / "real")  # the name without a link wins, although `alias` sorts first
    (folder / "other").symlink_to(tmp_path / "elsewhere")
    (folder / "real" / "up").symlink_to(folder)
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to(tmp_path / "elsewhere")
    (folder / "same.txt").symlink_to(folder / "real" / "x.txt")
    (folder / "self").symlink_to(folder / "self")
    assert names_of(folder) == ["loose.txt", "other/deep/y.txt", "other/z.txt", "real/x.txt"]


def test_what_is_ignored_is_counted_with_an_example(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(
        tmp_path / "in", "a.txt", "._a.txt", ".ipynb_checkpoints/a.txt", "README.md", "b.MD", "LICENSE", "c.txt.zst"
    )
    (folder / "gone.txt").symlink_to(folder / "missing.txt")
    os.mkfifo(folder / "pipe.txt")
    assert names_of(folder, folder / "a.txt") == ["a.txt"]
    (line,) = caplog.messages
    for part in (
        f"2 hidden ({folder}/._a.txt)",
        f"2 .md ({folder}/README.md)",
        f"1 .zst ({folder}/c.txt.zst)",
        f"1 without suffix ({folder}/LICENSE)",
        f"1 broken link ({folder}/gone.txt)",
        f"1 not a regular file ({folder}/pipe.txt)",
        f"1 listed twice ({folder}/a.txt)",
    ):
        assert part in line
    caplog.clear()
    assert names_of(make(tmp_path / ".hidden", "a.txt")) == ["a.txt"]  # a folder that is named may be hidden
    assert not caplog.messages
    with pytest.raises(UserError, match=r"holds no .txt, .jsonl.gz file; ignored are 1 .md"):
        names_of(make(tmp_path / "notes", "x.md"))


def test_outputs_are_no_inputs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(tmp_path / "in", "a.txt", "out/rejects.txt")
    (folder / "link").symlink_to(folder / "out")
    assert names_of(folder, outputs=(folder / "out",)) == ["a.txt"]
    assert "written by this tool" in caplog.text
    for given in (folder, folder / "link", folder / "a.txt"):
        with pytest.raises(UserError, match="an output of this run"):
            names_of(given, outputs=(given.resolve(),))


def test_names_that_are_not_utf8_are_shown_with_escapes(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    path.write_text("x")
    (file,) = list_inputs([tmp_path], (".txt",))
    assert file.name == r"caf\xe9.txt" and file.path == path
    assert describe_inputs([file])[0]["name"].encode("utf-8") == rb"caf\xe9.txt"
    with pytest.raises(UserError, match=r"caf\\xe9.txt/x does not exist"):
        list_inputs([path / "x"], (".txt",))


def test_unreadable_inputs_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (file,) = list_inputs([make(tmp_path, "a.txt")], (".txt",))
    monkeypatch.setattr("ebwm_dist.prepare.listing.sha256_of_file", denied)
    with pytest.raises(DataError, match=r"a.txt cannot be read \(Permission denied\)"):
        describe_inputs([file])
    monkeypatch.setattr("os.scandir", denied)
    with pytest.raises(DataError, match=r"input .* cannot be read \(Permission denied\)"):
        list_inputs([tmp_path], (".txt",))


def test_rejects_of_any_data_tool_are_no_inputs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(tmp_path / "in", "a.txt", "built/rejects.jsonl", "built/b.txt")
    assert [file.name for file in list_inputs([folder], (".txt", ".jsonl"))] == ["a.txt", "built/b.txt"]
    assert f"1 rejected by a data tool ({folder}/built/rejects.jsonl)" in caplog.messages[0]
