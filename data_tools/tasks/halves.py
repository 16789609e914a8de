"""Make prompts with completions of a text, to fine-tune a model of it: half of a line, and the rest.

    python data_tools/tasks/halves.py --input data/raw/sample.jsonl --out data/raw/halves.jsonl

Lines are drawn from documents with a text: some from the groups to train on, and some from those that the same
`--holdout-fraction` holds out of shards. A model of the text goes on with the next line at the end of one; trained on
these, it stops there.
"""

from __future__ import annotations

import argparse
import json
import random
from typing import Any

from ebwm_dist.errors import DataError, run_tool
from ebwm_dist.files import write_atomically
from ebwm_dist.prepare.document_reader import DocumentReader, find_documents
from ebwm_dist.prepare.documents import is_held_out
from ebwm_dist.storage import local_path

SHORTEST, LONGEST = 8, 40
"""Words of a line."""


def halves(line: str) -> dict[str, str]:
    """Return the first half of the words of a line, and the rest with the space before it."""
    words = line.split(" ")
    half = len(words) // 2
    return {"prompt": " ".join(words[:half]), "completion": f" {' '.join(words[half:])}"}


def main() -> None:
    """Write the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=local_path, nargs="+", required=True, help="documents, as of tokenize_text.py")
    parser.add_argument("--out", type=local_path, required=True, help="file of JSON lines to write")
    parser.add_argument("--documents", type=int, default=2000, help="from groups to train on (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=500, help="from groups held out (default: %(default)s)")
    parser.add_argument("--holdout-fraction", type=float, default=0.05, help="of the groups (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for document in DocumentReader(find_documents(args.input)):
        held_out = is_held_out(document.group, frozenset(), args.holdout_fraction)
        for number, line in enumerate(document.text.splitlines(), 1):
            if SHORTEST <= len(line.split(" ")) <= LONGEST:
                made = {"id": f"{document.id}:{number}", "group": document.group, **halves(line)}
                found[held_out].append(made)
    chosen = []
    for held_out, wanted in ((False, args.documents), (True, args.held_out)):
        if len(found[held_out]) < wanted:
            kind = "held out" if held_out else "to train on"
            raise DataError(
                f"{len(found[held_out])} lines {kind} have {SHORTEST} to {LONGEST} words, {wanted} are asked for"
            )
        chosen += random.Random(args.seed).sample(found[held_out], wanted)
    write_atomically(args.out, "".join(json.dumps(document) + "\n" for document in chosen).encode())
    print(f"{args.out}: {args.documents:,} prompts with completions to train on, {args.held_out:,} held out")


if __name__ == "__main__":
    run_tool(main)
