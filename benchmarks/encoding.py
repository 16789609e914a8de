"""How fast documents are encoded, here and by the libraries themselves, on the same text in one run.

python benchmarks/encoding.py
python benchmarks/encoding.py --json --megabytes 8

The text is the documentation of Python's library, in documents of `--characters`; a byte-level BPE and a sentencepiece
model of `--vocab` tokens are trained on it. Times are of the processor, the best of `--repeats`, and `ratio` is that of
encoding here to the fastest way of the library to get the same ids, which are compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece

from ebwm_dist.data.tokenizer import open_tokenizer
from ebwm_dist.evaluation.out_of_distribution import docstrings
from ebwm_dist.prepare.train_tokenizer import train_tokenizer


def byte_level(documents: list[str], size: int, path: Path) -> None:
    """Train a byte-level BPE and write it to `path`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", "<|padding|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(documents, trainer)
    model.save(str(path))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Encode in every way and return MB of text per second of the processor, and ratios."""
    text = docstrings(int(args.megabytes * 1e6))
    documents = [text[start : start + args.characters] for start in range(0, len(text), args.characters)]
    size = sum(len(document.encode()) for document in documents)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "tokenizer.json"), Path(folder, "tokenizer.model")
        byte_level(documents, args.vocab, files[0])
        train_tokenizer(documents, files[1], vocab_size=args.vocab)
        ours = [open_tokenizer(file) for file in files]
        from tokenizers import Tokenizer

        library = Tokenizer.from_file(str(files[0]))
        library.encode_special_tokens = True
        processor = sentencepiece.SentencePieceProcessor(model_file=str(files[1]))
    ways: dict[str, dict[str, Callable[[], list[list[int]]]]] = {
        "byte-level BPE": {
            "here": lambda: [ours[0].encode(document) for document in documents],
            "encode": lambda: [library.encode(document).ids for document in documents],
            "encode_batch": lambda: [found.ids for found in library.encode_batch(documents)],
            "encode_batch_fast": lambda: [found.ids for found in library.encode_batch_fast(documents)],
        },
        "sentencepiece": {
            "here": lambda: [ours[1].encode(document) for document in documents],
            "encode": lambda: [processor.encode(document) for document in documents],
        },
    }
    result: dict[str, Any] = {"megabytes": size / 1e6, "vocab": args.vocab, "kinds": {}}
    for kind, of_kind in ways.items():
        times = dict.fromkeys(of_kind, float("inf"))
        for _ in range(args.repeats):
            expected = None
            for way, encode in of_kind.items():
                start = time.process_time()
                ids = encode()
                times[way] = min(times[way], time.process_time() - start)
                expected = expected or ids
                if ids != expected:
                    sys.exit(f"{kind}: {way} gives other ids")
        rates = {way: size / 1e6 / seconds for way, seconds in times.items()}
        fastest = max(rate for way, rate in rates.items() if way != "here")
        result["kinds"][kind] = {"megabytes_per_second": rates, "ratio": rates["here"] / fastest}
    return result


def main() -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=2.0, help="of text (default: %(default)s)")
    parser.add_argument("--characters", type=int, default=4000, help="of a document (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=8000, help="tokens (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    result = measure(args := parser.parse_args())
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    for kind, found in result["kinds"].items():
        rates = ", ".join(f"{way} {rate:.2f}" for way, rate in found["megabytes_per_second"].items())
        print(f"{kind}: MB per CPU second {rates}; ratio {found['ratio']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
