"""Make a data folder: documents -> tokens -> packed rows -> shards -> manifest.

The old manifest is removed first and the new one written last, so a folder with a manifest is always whole.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ebwm_dist.data.content import TokenContent
from ebwm_dist.data.documents import (
    Document,
    DocumentReader,
    Fields,
    InputFile,
    Reject,
    describe_inputs,
    find_inputs,
    is_held_out,
)
from ebwm_dist.data.encoding import encode_documents
from ebwm_dist.data.files import write_atomically
from ebwm_dist.data.manifest import FILE_NAME, SPLITS, Manifest, Split
from ebwm_dist.data.packing import Packer
from ebwm_dist.data.tokenizer import Tokenizer
from ebwm_dist.data.writer import ShardWriter
from ebwm_dist.errors import DataError, UserError

TOKENIZER_NAME = "tokenizer.model"
REJECTS_NAME = "rejects.jsonl"


@dataclass(frozen=True)
class Layout:
    """How rows are laid out and which groups are held out: all settings that change the shards."""

    sequence_length: int
    samples_per_member: int = 64
    members_per_shard: int = 64
    holdout: tuple[str, ...] = ()
    holdout_fraction: float = 0.0


@dataclass(frozen=True)
class Report:
    """What `build` did."""

    manifest: Manifest
    up_to_date: bool
    seconds: float
    rejects: int


class _SplitBuilder:
    """Collects one split: packs its tokens, writes its shards, counts what went in."""

    def __init__(self, folder: Path, split: str, content: TokenContent, layout: Layout) -> None:
        self._packer = Packer(content.sequence_length, layout.samples_per_member, content.eos_id, content.pad_id)
        self._writer = ShardWriter(folder, split, content, layout.members_per_shard)
        self.groups: set[str] = set()
        self._documents = self._tokens = self._text_bytes = 0

    def add(self, document: Document, tokens: np.ndarray) -> None:
        self.groups.add(document.group)
        self._documents += 1
        self._tokens += len(tokens)
        self._text_bytes += len(document.text.encode("utf-8"))
        for block in self._packer.add(tokens):
            self._writer.write(block)

    def finish(self) -> Split:
        for block in self._packer.finish():
            self._writer.write(block)
        self._writer.close()
        totals = {"documents": self._documents, "tokens": self._tokens, "text_bytes": self._text_bytes}
        return Split(tuple(self._writer.shards), len(self.groups), totals)


def build(
    inputs: Iterable[str | Path],
    tokenizer: Tokenizer,
    out: Path,
    layout: Layout,
    *,
    fields: Fields | None = None,
    on_error: str = "fail",
    workers: int = 0,
    progress: bool = False,
) -> Report:
    """Make the data folder `out`, unless it holds exactly this already."""
    start = time.monotonic()
    files = find_inputs(list(inputs))
    fields = fields or Fields()
    source = {"inputs": describe_inputs(files), "fields": asdict(fields), "on_error": on_error, **asdict(layout)}
    source = json.loads(json.dumps(source))  # as it will be read back: lists, not tuples
    if (existing := _up_to_date(out, source, tokenizer)) is not None:
        rejects = existing.source["rejects"]
        return Report(existing, True, time.monotonic() - start, rejects)

    out.mkdir(parents=True, exist_ok=True)
    _clear(out)
    if not (out / TOKENIZER_NAME).exists() or Tokenizer(out / TOKENIZER_NAME).sha256 != tokenizer.sha256:
        write_atomically(out / TOKENIZER_NAME, tokenizer.path.read_bytes())

    reader = DocumentReader(files, fields, on_error)
    content = TokenContent(
        sequence_length=layout.sequence_length,
        dtype="uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        tokenizer=TOKENIZER_NAME,
        tokenizer_sha256=tokenizer.sha256,
    )
    builders = {name: _SplitBuilder(out, name, content, layout) for name in SPLITS}
    _fill(builders, reader, tokenizer, layout, files, workers, progress)
    if reader.rejects:
        _write_rejects(out / REJECTS_NAME, reader.rejects)
    manifest = Manifest(
        folder=out,
        content=content,
        splits={name: builder.finish() for name, builder in builders.items()},
        held_out_groups=tuple(sorted(builders["val"].groups)),
        source={**source, "rejects": len(reader.rejects), "empty": reader.empty},
    )
    manifest.save()
    return Report(manifest, False, time.monotonic() - start, len(reader.rejects))


def _fill(
    builders: dict[str, _SplitBuilder],
    reader: DocumentReader,
    tokenizer: Tokenizer,
    layout: Layout,
    files: list[InputFile],
    workers: int,
    progress: bool,
) -> None:
    """Send every document to its split; both must get some, and every group named must exist."""
    from tqdm import tqdm

    names = frozenset(layout.holdout)
    encoded = encode_documents(reader, tokenizer, workers)
    for document, tokens in tqdm(encoded, unit=" documents", desc="encode", disable=None if progress else True):
        held_out = is_held_out(document.group, names, layout.holdout_fraction)
        builders["val" if held_out else "train"].add(document, tokens)
    if missing := sorted(names - builders["val"].groups):
        known = ", ".join(sorted(builders["train"].groups | builders["val"].groups)[:8])
        raise UserError(f"held-out group {missing[0]!r} is not in the input; its groups are {known}, ...")
    for name, builder in builders.items():
        if not builder.groups:
            raise UserError(
                f"no document is left for the {name} split of {', '.join(f.name for f in files[:3])}: "
                "choose other groups with --holdout, or another --holdout-fraction"
            )


def _up_to_date(out: Path, source: dict[str, object], tokenizer: Tokenizer) -> Manifest | None:
    """Return the manifest of `out` if the folder is whole and was made from the same inputs and settings."""
    try:
        manifest = Manifest.load(out)
        manifest.check_files()
        manifest.check_tokenizer(tokenizer.sha256, str(tokenizer.path))
        manifest.check_tokenizer(Tokenizer(out / manifest.token_content.tokenizer).sha256, TOKENIZER_NAME)
    except DataError:
        return None
    same = {key: manifest.source.get(key) for key in source} == source
    return manifest if same else None


def _clear(out: Path) -> None:
    """Remove what an earlier run made, its manifest first, so that nothing half-made looks whole."""
    (out / FILE_NAME).unlink(missing_ok=True)
    (out / REJECTS_NAME).unlink(missing_ok=True)
    for split in SPLITS:
        for pattern in (f"{split}-[0-9]*.tar", f"{split}-[0-9]*.index.json", f".{split}-[0-9]*.tmp"):
            for path in out.glob(pattern):
                path.unlink()


def _write_rejects(path: Path, rejects: list[Reject]) -> None:
    write_atomically(path, "".join(json.dumps(asdict(reject)) + "\n" for reject in rejects).encode("utf-8"))
