"""The unigram baseline: what perplexity knowing only the frequency of each token gives on the held-out split."""

from __future__ import annotations

import numpy as np

from ebwm_dist.data.format.manifest import Manifest
from ebwm_dist.data.format.reader import ShardReader


def target_counts(manifest: Manifest, split: str) -> np.ndarray:
    """Count every token among the targets of a split, `[vocab_size]`; the pad token counts 0."""
    token_format = manifest.token_format
    counts = np.zeros(token_format.vocab_size, dtype=np.int64)
    for block in ShardReader(manifest, split).blocks():
        counts += np.bincount(block[:, 1:].reshape(-1), minlength=token_format.vocab_size)
    counts[token_format.pad_id] = 0
    return counts


def unigram_perplexity(manifest: Manifest) -> float:
    """Return the perplexity on `val` of token frequencies counted on `train`, with one added to each count."""
    train = target_counts(manifest, "train") + 1
    val = target_counts(manifest, "val")
    log_probabilities = np.log(train / train.sum())
    return float(np.exp(-(val * log_probabilities).sum() / val.sum()))
