"""A tiny data folder with a tokenizer trained on it, for every test that needs something to train on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import sentencepiece
import tokenizers

from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.tokenizer import Tokenizer, open_tokenizer
from ebwm_dist.prepare.document_reader import DocumentReader, find_documents
from ebwm_dist.prepare.text_shards import Layout, build_text_shards
from ebwm_dist.prepare.train_tokenizer import train_tokenizer
from ebwm_dist.workers.executors import LOCAL, Work

SYLLABLES = ("ka", "lo", "mi", "ru", "ten", "vas", "sho", "bel", "dor", "fin")
HELD_OUT = "book 0"


def tiny_documents(count: int, words: int = 60) -> list[dict[str, str]]:
    """Make up documents in five groups whose words follow each other by a rule, so that there is something to learn."""
    generator = random.Random(0)
    vocabulary = ["".join(generator.choices(SYLLABLES, k=generator.randint(1, 3))) for _ in range(80)]
    successors = {word: generator.sample(vocabulary, 3) for word in vocabulary}
    documents = []
    for number in range(count):
        text = [generator.choice(vocabulary)]
        while len(text) < words:
            text.append(generator.choice(successors[text[-1]]))
        lines = "\n".join(" ".join(text[i : i + 10]) for i in range(0, words, 10))
        documents.append({"id": f"text {number}", "group": f"book {number % 5}", "text": lines})
    return documents


def lossy_tokenizer(path: Path, **options: object) -> Tokenizer:
    """Train a tokenizer as sentencepiece does by default: it folds spaces and normalises characters."""
    texts = iter([document["text"] for document in tiny_documents(20)])
    with open(path, "wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts, model_writer=writer, vocab_size=300, pad_id=3, hard_vocab_limit=False, **options
        )
    return open_tokenizer(path)


def byte_level_tokenizer(
    folder: Path,
    *,
    vocab_size: int = 320,
    special: tuple[str, ...] = ("<|endoftext|>", "<|padding|>"),
    **settings: object,
) -> Path:
    """Train a byte-level BPE and save it as transformers does, with these `settings`; return the folder."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([document["text"] for document in tiny_documents(20)], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def make_tiny_data(
    folder: Path, *, sequence_length: int = 16, vocab_size: int = 320, documents: int = 60, work: Work = LOCAL
) -> Manifest:
    """Make a whole data folder in `folder` with the code of the tools: many small shards, `book 0` held out.

    The manifest's `vocab_size` is exactly the one asked for.
    """
    source = folder.parent / f"{folder.name}.jsonl"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(json.dumps(document) + "\n" for document in tiny_documents(documents)))
    texts = (document.text for document in DocumentReader(find_documents([source])) if document.group != HELD_OUT)
    tokenizer = train_tokenizer(texts, folder / "tokenizer.model", vocab_size=vocab_size)
    assert tokenizer.vocab_size == vocab_size, f"ask for at most {tokenizer.vocab_size} tokens, or more documents"
    layout = Layout(sequence_length, samples_per_member=8, members_per_shard=4, holdout=(HELD_OUT,))
    return build_text_shards([source], tokenizer, folder, layout, work=work).manifest
