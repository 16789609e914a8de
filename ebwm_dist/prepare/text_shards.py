"""Build a data folder of text, or of prompts with completions: documents -> tokens -> rows -> shards -> manifest.

The first document decides which of them. Of prompts with completions the totals `tokens` and `text_bytes` count what is
predicted: the completions, and the end tokens among the tokens.

After an interruption the next run reads all documents again, but encodes only those after the last finished shard.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_dist.data.format.index import finished_shard, read_build_record, write_build_record
from ebwm_dist.data.format.manifest import SPLITS, Manifest, Shard, Split
from ebwm_dist.data.format.sample_format import CONTEXT, TokenFormat
from ebwm_dist.data.format.writer import ShardWriter
from ebwm_dist.data.tokenizer import Tokenizer
from ebwm_dist.errors import DataError, UserError
from ebwm_dist.files import printable, sha256_of_file, write_atomically
from ebwm_dist.prepare.build_state import Report, begin, finish, hash_of, up_to_date, write_rejects
from ebwm_dist.prepare.document_reader import DocumentReader, LeftOut, Reject, find_documents
from ebwm_dist.prepare.documents import Document, Fields, is_held_out
from ebwm_dist.prepare.encoding import encode_documents
from ebwm_dist.prepare.listing import REJECTS_FILE, describe_inputs
from ebwm_dist.prepare.packing import DocumentPacker, Packer
from ebwm_dist.workers.executors import LOCAL, Work

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """Rows, shards and held-out groups: the settings that change the shards."""

    sequence_length: int
    samples_per_member: int = 64
    members_per_shard: int = 64
    holdout: tuple[str, ...] = ()
    holdout_fraction: float = 0.0


@dataclass(frozen=True)
class _Position:
    """Where a shard of a split ends: after `offset` tokens of the document that follows `documents` others.

    So far there are `samples` rows; `tokens` counts the targets of the documents before, `last` is the token that the
    next row starts with.
    """

    samples: int
    documents: int
    tokens: int
    offset: int
    last: int


class _SplitBuilder:
    """Packs and writes one split and counts its documents, from the end of the shards of an interrupted run on."""

    def __init__(self, folder: Path, split: str, sample_format: TokenFormat, layout: Layout, made_from: str) -> None:
        self._folder, self._format, self._made_from = folder, sample_format, made_from
        self._start = _Position(0, 0, 0, 0, sample_format.eos_id)
        self.kept: list[Shard] = []
        self._rejects: dict[int, Reject] = {}  # by the numbers of the documents
        while shard := finished_shard(folder, f"{split}-{len(self.kept):06d}.tar"):
            record = read_build_record(folder, shard)
            if record.get("made_from") != made_from:
                break
            self.kept.append(shard)
            self._start = _Position(**record["end"])
            self._rejects |= {number: Reject(**reject) for number, reject in record.get("rejects", [])}
        packer = DocumentPacker if sample_format.labels else Packer
        length, rows = sample_format.sequence_length, layout.samples_per_member
        self._packer = packer(length, rows, self._start.last, sample_format.pad_id)
        self._writer = ShardWriter(folder, split, sample_format, layout.members_per_shard, first_shard=len(self.kept))
        self.groups: set[str] = set()
        self._found = self._text_bytes = 0
        self._added, self._samples, self._tokens = self._start.documents, self._start.samples, self._start.tokens
        self._recorded_rejects = len(self._rejects)

    @property
    def rejects(self) -> list[Reject]:
        """Return the documents that were too long, also for an interrupted run."""
        return list(self._rejects.values())

    def is_done(self, document: Document) -> bool:
        """Count the next document; return whether the shards of an interrupted run hold all of it."""
        done = self._found < self._start.documents
        if done and self._found not in self._rejects:
            self._count(document)
        self._found += 1
        return done

    def add(self, document: Document, tokens: np.ndarray) -> None:
        """Append the tokens of the next document that is not done."""
        self._count(document)
        resumed = self._added == self._start.documents
        for block in self._packer.add(tokens[..., self._start.offset :] if resumed else tokens):
            shards = len(self._writer.shards)
            self._writer.write(block)
            self._samples += len(block)
            if len(self._writer.shards) > shards:
                self._record(tokens)
        self._added += 1
        self._tokens += int(np.count_nonzero(tokens[1] > CONTEXT)) if self._format.labels else len(tokens)

    def leave_out(self, reject: Reject) -> None:
        """Leave out the next document that is not done, as it is too long."""
        self._rejects[self._added] = reject
        self._added += 1

    def _count(self, document: Document) -> None:
        self.groups.add(document.group)
        texts = [turn.completion for turn in document.turns] or [document.text]
        self._text_bytes += sum(len(text.encode("utf-8")) for text in texts)

    def _record(self, tokens: np.ndarray) -> None:
        """Store with the last shard where it ends: within the document of these tokens, or before a whole one."""
        record: dict[str, Any] = {"made_from": self._made_from}
        if self._format.labels:
            position = _Position(self._samples, self._added, self._tokens, 0, self._format.eos_id)
            new = list(self._rejects.items())[self._recorded_rejects :]
            record["rejects"] = [[number, asdict(reject)] for number, reject in new]
            self._recorded_rejects = len(self._rejects)
        else:
            offset = self._samples * self._format.sequence_length - self._tokens
            position = _Position(self._samples, self._added, self._tokens, offset, int(tokens[offset - 1]))
        write_build_record(self._folder, self._writer.shards[-1], {**record, "end": asdict(position)})

    def finish(self) -> Split:
        for block in self._packer.finish():
            self._writer.write(block)
        self._writer.close()
        documents = self._added - len(self._rejects)
        totals = {"documents": documents, "tokens": self._tokens, "text_bytes": self._text_bytes}
        return Split((*self.kept, *self._writer.shards), len(self.groups), totals)


def build_text_shards(
    inputs: Iterable[str | Path],
    tokenizer: Tokenizer,
    out: Path,
    layout: Layout,
    *,
    fields: Fields | None = None,
    on_error: str = "fail",
    allow_lossy: bool = False,
    work: Work = LOCAL,
) -> Report:
    """Build the data folder `out`, unless it is up to date.

    Raises:
        UserError: missing or malformed inputs, a held-out group that is not in the input, a split without documents,
            or a lossy tokenizer without `allow_lossy`.
    """
    start = time.monotonic()
    if lost := tokenizer.losses():
        message = f"tokenizer {printable(tokenizer.path)} is lossy: decoding does not give back {', '.join(lost)}"
        if not allow_lossy:
            raise DataError(f"{message}; train one with data_tools/train_tokenizer.py, or add --allow-lossy")
        _log.warning("WARNING: %s", message)
    files = find_documents(inputs, outputs=(out, out / REJECTS_FILE))
    fields = fields or Fields()
    source: dict[str, Any] = {"inputs": describe_inputs(files), "fields": fields.describe(), "on_error": on_error}
    source |= {**asdict(layout), "tokenizer_sha256": tokenizer.sha256}
    if tokenizer.settings:  # none where the file alone says how it is used, as those of earlier releases did
        source["tokenizer"] = tokenizer.settings
    model = out / tokenizer.file_name
    has_model = model.is_file() and sha256_of_file(model) == tokenizer.sha256
    if (existing := up_to_date(out, source)) is not None and has_model:
        return _report(existing, start, up_to_date=True)

    begin(out)
    if not has_model:
        write_atomically(model, tokenizer.path.read_bytes())

    reader = DocumentReader(files, fields, on_error)
    documents = iter(reader)
    first = next(documents, None)
    sample_format = TokenFormat(
        sequence_length=layout.sequence_length,
        dtype="uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        **asdict(tokenizer.special),
        tokenizer=tokenizer.file_name,
        tokenizer_sha256=tokenizer.sha256,
        labels=first is not None and bool(first.turns),
    )
    builders = {name: _SplitBuilder(out, name, sample_format, layout, hash_of(source)) for name in SPLITS}
    every = itertools.chain([] if first is None else [first], documents)
    _add_documents(builders, reader, _of_one_kind(every, reader, sample_format.labels), tokenizer, layout, work)
    too_long = [reject for builder in builders.values() for reject in builder.rejects]
    places = {file.name: number for number, file in reversed(list(enumerate(files)))}
    rejects = sorted([*reader.rejects, *too_long], key=lambda reject: (places[reject.file], reject.line))
    write_rejects(out, rejects)
    described: dict[str, Any] = {"rejects": len(rejects)}
    if rejects:
        described["left_out"] = asdict(LeftOut.of(rejects))
    manifest = Manifest(
        folder=out,
        sample_format=sample_format,
        splits={name: builder.finish() for name, builder in builders.items()},
        held_out_groups=tuple(sorted(builders["val"].groups)),
        source={**source, **described, "empty": reader.empty},
    )
    finish(manifest)
    return _report(manifest, start, kept=sum(len(builder.kept) for builder in builders.values()))


def _report(manifest: Manifest, start: float, up_to_date: bool = False, kept: int = 0) -> Report:
    rejects, empty = manifest.source["rejects"], manifest.source["empty"]
    # Earlier releases counted places alone.
    left_out = LeftOut(**manifest.source.get("left_out", {"places": rejects, "documents": rejects, "uncounted": 0}))
    notes = (f"{empty:,} empty documents left out",) if empty else ()
    return Report(manifest, time.monotonic() - start, up_to_date, kept, rejects, notes, left_out.describe())


def _of_one_kind(documents: Iterable[Document], reader: DocumentReader, labels: bool) -> Iterator[Document]:
    """Yield the documents of the kind that the build holds, and reject the others."""
    kinds = "a text", "prompts with completions"
    for document in documents:
        if bool(document.turns) == labels:
            yield document
        else:
            reason = f"{kinds[not labels]}, but the first document is {kinds[labels]}; make another data folder of it"
            reader.reject(document.file, document.line, reason)


def _add_documents(
    builders: dict[str, _SplitBuilder],
    reader: DocumentReader,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    layout: Layout,
    work: Work,
) -> None:
    """Add every document to its split; both must get some, and every group of `layout.holdout` must exist."""
    from tqdm import tqdm

    names = frozenset(layout.holdout)

    def builder_of(document: Document) -> _SplitBuilder:
        return builders["val" if is_held_out(document.group, names, layout.holdout_fraction) else "train"]

    left = (document for document in documents if not builder_of(document).is_done(document))
    encoded = encode_documents(left, tokenizer, work)
    for document, tokens in tqdm(encoded, unit=" documents", desc="encode", disable=None if work.progress else True):
        if document.turns and tokens.shape[1] > layout.sequence_length:
            length, limit = tokens.shape[1], layout.sequence_length
            reason = f"its {length} tokens, the end token among them, are more than --sequence-length {limit}"
            builder_of(document).leave_out(reader.left_out(document.file, document.line, reason))
        else:
            builder_of(document).add(document, tokens)
    if missing := sorted(names - builders["val"].groups):
        known = ", ".join(sorted(builders["train"].groups | builders["val"].groups)[:8])
        raise UserError(f"held-out group {missing[0]!r} is not in the input; its groups are {known}, ...")
    for name, builder in builders.items():
        if not builder.groups:
            what = f"{name} split of {', '.join(file.name for file in reader.files[:3])}"
            if reader.rejects:
                first = reader.rejects[0]
                left_out = LeftOut.of(reader.rejects).describe()
                what += f" ({left_out} left out, first {first.place}: {first.reason})"
            raise UserError(
                f"no document is left for the {what}: choose other groups with --holdout, or another --holdout-fraction"
            )
