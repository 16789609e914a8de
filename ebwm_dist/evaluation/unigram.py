"""The unigram baseline: the perplexity of a model that has only the frequency of each token."""

from __future__ import annotations

import numpy as np

from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.format.reader import ShardReader
from ebwm_dist.run import ValidationData


def unigram_perplexity(data: ValidationData, max_sequences: int) -> float:
    """Return the perplexity on held-out text of the training text's frequencies, with one added to each count.

    Data sets of a mixture count by their shares, those that are held out by the samples that are evaluated.
    """
    size = data.mixture.manifest.token_format.vocab_size
    train, val = np.zeros(size), np.zeros(size)
    for source, held_out in zip(data.mixture.sources, data.counts(max_sequences), strict=True):
        if not held_out:
            continue  # its weight has become 0
        counts = target_counts(source.manifest, "train") + 1
        train += source.quota * counts / counts.sum()
        val += target_counts(source.manifest, "val") * held_out / source.manifest.val.samples
    log_probabilities = np.log(train / train.sum())
    return float(np.exp(-(val * log_probabilities).sum() / val.sum()))


def target_counts(manifest: Manifest, split: str) -> np.ndarray:
    """Count every token among the targets of a split, `[vocab_size]`; the pad token counts 0."""
    token_format = manifest.token_format
    counts = np.zeros(token_format.vocab_size, dtype=np.int64)
    for block in ShardReader(manifest, split).blocks():
        counts += np.bincount(token_format.targets(block).reshape(-1), minlength=token_format.vocab_size)
    counts[token_format.pad_id] = 0
    return counts
