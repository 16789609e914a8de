"""Encode text and pack it into training shards with a held-out split.

    python data_tools/tokenize_text.py --input data/raw/sample.jsonl --tokenizer data/text/tokenizer.model \\
        --out data/text --sequence-length 256 --holdout Ruth Jonah Mark

An interrupted run is continued by the same command.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

from ebwm_dist.data.tokenizer import Tokenizer, open_tokenizer
from ebwm_dist.errors import run_tool
from ebwm_dist.files import printable
from ebwm_dist.prepare.documents import Fields, add_document_arguments, add_groups_argument
from ebwm_dist.prepare.text_shards import Layout, build_text_shards
from ebwm_dist.storage import local_path
from ebwm_dist.workers.executors import Work, add_arguments


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_document_arguments(parser)
    parser.add_argument(
        "--tokenizer",
        required=True,
        type=local_path,
        help="sentencepiece model (as train_tokenizer.py makes it), tokenizer.json, or folder saved by transformers",
    )
    parser.add_argument("--eos-token", metavar="TOKEN", help="its end token (default: found by configuration or name)")
    parser.add_argument(
        "--pad-token", metavar="TOKEN", help="its pad token, which no text may hold (default: found, or an id is added)"
    )
    parser.add_argument(
        "--allow-special",
        action="store_true",
        help="special tokens that occur in a text are those tokens, except padding (default: they are text)",
    )
    parser.add_argument(
        "--out", type=local_path, default=Path("data/text"), help="data folder to make (default: data/text)"
    )
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens of context per sample (default: 256)")
    parser.add_argument("--samples-per-member", type=int, default=64, help="samples per tar member (default: 64)")
    parser.add_argument("--members-per-shard", type=int, default=64, help="tar members per shard (default: 64)")
    add_groups_argument(parser, "--holdout", "groups held out for validation")
    parser.add_argument(
        "--holdout-fraction",
        type=float,
        help="fraction of groups to hold out by a hash of their names (default: 0.05 without --holdout, else 0)",
    )
    parser.add_argument(
        "--allow-lossy", action="store_true", help="accept a tokenizer that drops or changes characters, with a warning"
    )
    add_arguments(parser)
    options = parser.parse_args(arguments)
    if options.holdout_fraction is None:
        options.holdout_fraction = 0.0 if options.holdout else 0.05
    if not 0.0 <= options.holdout_fraction < 1.0:
        parser.error("--holdout-fraction must be at least 0 and below 1")
    if not options.holdout and not options.holdout_fraction:
        parser.error("--holdout-fraction 0 holds nothing out for validation; give more, or name groups with --holdout")
    for name in ("sequence_length", "samples_per_member", "members_per_shard"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    options.holdout = tuple(sorted(set(options.holdout)))
    return options


def warn_of_leak(tokenizer: Tokenizer, layout: Layout) -> None:
    """Warn if the record beside the tokenizer says that it was trained on groups that are held out now."""
    try:
        source = json.loads(tokenizer.path.with_name(tokenizer.path.name + ".json").read_text("utf-8"))["source"]
        learned = sorted(set(layout.holdout) - set(source["exclude_group"]))
        leaks = bool(learned) or layout.holdout_fraction > source["exclude_fraction"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # a tokenizer from elsewhere has no record
    if leaks:
        print(
            f"WARNING: {printable(tokenizer.path)} was also trained on text that is held out now; for a clean split "
            "train it with --exclude-group and --exclude-fraction equal to --holdout and --holdout-fraction",
            file=sys.stderr,
        )


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    layout = Layout(**{field.name: getattr(options, field.name) for field in fields(Layout)})
    tokenizer = open_tokenizer(
        options.tokenizer,
        eos_token=options.eos_token,
        pad_token=options.pad_token,
        allow_special=options.allow_special,
    )
    print(tokenizer.describe())
    report = build_text_shards(
        options.input,
        tokenizer,
        options.out,
        layout,
        fields=Fields.of(options),
        on_error=options.on_error,
        allow_lossy=options.allow_lossy,
        work=Work.of(options),
    )
    warn_of_leak(tokenizer, layout)
    print(report.describe())


if __name__ == "__main__":
    run_tool(main)
