"""Tokenizers of text: sentencepiece models, and files `tokenizer.json` of the tokenizers library."""

from ebwm_dist.data.tokenizer.interface import PROBES, SpecialTokens, Tokenizer
from ebwm_dist.data.tokenizer.opening import load_tokenizer, open_tokenizer, reopen_tokenizer

__all__ = ["PROBES", "SpecialTokens", "Tokenizer", "load_tokenizer", "open_tokenizer", "reopen_tokenizer"]
