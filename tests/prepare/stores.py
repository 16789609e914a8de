"""Stores with documents for the tools that prepare data."""

from __future__ import annotations

import json
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from pyarrow.fs import FileSystem

from ebwm_dist.prepare.document_reader import DocumentReader, find_documents
from tests.tiny_data import tiny_documents

Put = Callable[[dict[str, bytes]], None]
Store = tuple[str, Put]
"""The address of a folder, `{}` being a path in it, and what puts files there in place of all others."""


def lines(documents: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(document) + "\n" for document in documents).encode()


def parquet(documents: list[dict[str, str]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(documents), sink, row_group_size=6)
    return sink.getvalue().to_pybytes()


def tiny_files() -> dict[str, bytes]:
    """Return the tiny data in several formats, beside files that are no inputs."""
    documents = tiny_documents(60)
    return {
        "a/x y.parquet": parquet(documents[:20]),
        "a/z#1.jsonl.zst": zstandard.compress(lines(documents[20:40])),
        "b.jsonl": lines(documents[40:]),
        "notes.md": b"no input",
        "a/.hidden.jsonl": b"{",
        "built/rejects.jsonl": b"{",
    }


def object_store(address: str) -> Store:
    storage, path = FileSystem.from_uri(address.format("data"))

    def put(files: dict[str, bytes]) -> None:
        storage.delete_dir_contents(path, missing_dir_ok=True)
        for name, content in files.items():
            with storage.open_output_stream(f"{path}/{name}", compression=None) as stream:
                stream.write(content)

    return address.format("data{}"), put


def texts(*inputs: str) -> list[tuple[str, str]]:
    return [(document.id, document.text) for document in DocumentReader(find_documents(inputs))]
