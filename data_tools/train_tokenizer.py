"""Train a lossless sentencepiece tokenizer.

    python data_tools/train_tokenizer.py --input data/raw/sample.jsonl --vocab-size 1000 \\
        --exclude-group Ruth Jonah Mark --out data/text/tokenizer.model

Prompts and completions are learned from like other text. Exclude the groups that tokenize_text.py will hold out, so
that nothing is learned from the text a model is judged on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

from ebwm_dist.errors import UserError, run_tool
from ebwm_dist.files import sha256_of_file, write_json
from ebwm_dist.prepare.document_reader import DocumentReader, LeftOut, find_documents
from ebwm_dist.prepare.documents import Fields, add_document_arguments, add_groups_argument, is_held_out
from ebwm_dist.prepare.listing import describe_inputs
from ebwm_dist.prepare.train_tokenizer import train_tokenizer
from ebwm_dist.storage import local_path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_document_arguments(parser)
    parser.add_argument("--out", type=local_path, default=Path("data/text/tokenizer.model"), help="model file to write")
    parser.add_argument("--vocab-size", type=int, default=1000, help="number of tokens (default: 1000)")
    parser.add_argument(
        "--model-type",
        choices=("unigram", "bpe", "word"),
        default="unigram",
        help="unigram (default) encodes faster than bpe; word: every word is a token, as tasks of symbols need",
    )
    add_groups_argument(parser, "--exclude-group", "groups not to learn from")
    parser.add_argument(
        "--exclude-fraction", type=float, default=0.0, help="the --holdout-fraction of tokenize_text.py (default: 0)"
    )
    return parser.parse_args(arguments)


def is_up_to_date(out: Path, sidecar: Path, source: dict[str, object]) -> bool:
    """Tell whether `out` is there, unchanged, and made from `source`."""
    try:
        content = json.loads(sidecar.read_text("utf-8"))
        return bool(content["source"] == source and content["sha256"] == sha256_of_file(out))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _fields(fields: Fields) -> list[str]:
    """Return the names of fields for the record; those of prompts and completions only where they were chosen."""
    text, name, group, *chosen = fields.describe().items()
    return [text[1], name[1], group[1], *(f"{key}={value}" for key, value in chosen)]


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    sidecar = options.out.with_name(options.out.name + ".json")
    files = find_documents(options.input, outputs=(options.out, sidecar))
    fields = Fields.of(options)
    excluded = frozenset(options.exclude_group)
    source: dict[str, object] = {
        "inputs": describe_inputs(files),
        "fields": _fields(fields),
        "on_error": options.on_error,
        "vocab_size": options.vocab_size,
        "model_type": options.model_type,
        "exclude_group": sorted(excluded),
        "exclude_fraction": options.exclude_fraction,
    }
    if is_up_to_date(options.out, sidecar, source):
        print(f"{options.out}: up to date")
        return

    start = time.monotonic()
    reader = DocumentReader(files, fields, options.on_error)
    groups: set[str] = set()

    def texts() -> Iterator[str]:
        for document in reader:
            groups.add(document.group)
            if not is_held_out(document.group, excluded, options.exclude_fraction):
                yield from document.texts

    sidecar.unlink(missing_ok=True)
    tokenizer = train_tokenizer(texts(), options.out, vocab_size=options.vocab_size, model_type=options.model_type)
    if missing := sorted(excluded - groups):
        options.out.unlink()  # it may have learned from the text that was meant
        raise UserError(f"excluded group {missing[0]!r} is not in the input; its groups are {sorted(groups)[:8]}")
    write_json(sidecar, {"sha256": tokenizer.sha256, "source": source})
    left_out = f", {LeftOut.of(reader.rejects).describe()} left out" if reader.rejects else ""
    asked = f" ({options.vocab_size} asked for)" if tokenizer.vocab_size != options.vocab_size else ""
    seconds = time.monotonic() - start
    print(f"{options.out}: model.vocab_size={tokenizer.vocab_size}{asked}, {seconds:.1f} s{left_out}")


if __name__ == "__main__":
    run_tool(main)
