"""Which tokens end documents and fill rows up, where a tokenizer is used for the first time.

They are named by the user, by the configuration that transformers saves beside a tokenizer, by the model itself, or
known by their names. A pad token is never predicted, so it must be a token that no text holds and not the end token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ebwm_dist.data.tokenizer.interface import SpecialTokens, Tokenizer
from ebwm_dist.errors import DataError

_KNOWN = {
    "eos": ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<EOS>"),
    "pad": ("<|padding|>", "<pad>", "[PAD]", "<|pad|>", "<PAD>", "<|finetune_right_pad_id|>"),
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]"),
}
_SHOWN = 8


def choose_special_tokens(
    tokenizer: Tokenizer,
    eos_token: str | None,
    pad_token: str | None,
    configured: Mapping[str, str],
    allow_special: bool,
) -> None:
    """Assign its special tokens.

    Args:
        tokenizer: one that has none yet.
        eos_token: the end token's name, None to find it.
        pad_token: the pad token's name, None to find it or add one.
        configured: names of tokens that a configuration beside it has, by `eos`, `pad` and `bos`.
        allow_special: whether special tokens that occur in a text are tokens.

    Raises:
        DataError: a token cannot be found, or cannot be what it is meant to be.
    """
    if eos_token is not None:
        eos = _named(tokenizer, eos_token, "--eos-token")
    elif (found := next(_candidates(tokenizer, "eos", configured), None)) is not None:
        eos = found
    else:
        raise DataError(
            f"{tokenizer.name}: no end token is known by its name; name one with --eos-token (special tokens: "
            f"{_special_tokens(tokenizer)})"
        )
    size = tokenizer.size
    if pad_token is not None:
        pad = _named(tokenizer, pad_token, "--pad-token")
        if (problem := _not_for_padding(tokenizer, pad, eos)) is not None:
            raise DataError(
                f"{tokenizer.name}: --pad-token {pad_token!r} {problem}, and padding is never predicted; name another "
                "token, or none to add one"
            )
    else:
        usable = (
            token for token in _candidates(tokenizer, "pad", configured) if not _not_for_padding(tokenizer, token, eos)
        )
        pad = next(usable, size)
    bos = next(_candidates(tokenizer, "bos", configured), -1)
    tokenizer.assign(SpecialTokens(max(size, pad + 1), pad, bos, eos, allow_special))


def _candidates(tokenizer: Tokenizer, role: str, configured: Mapping[str, str]) -> Iterator[int]:
    """Yield tokens for a role: the configured one, the file's own, and those known by their names."""
    name, own = configured.get(role), tokenizer.own_ids.get(f"{role}_id")
    tokens = [None if name is None else tokenizer.find(name), own, *map(tokenizer.find, _KNOWN[role])]
    yield from (token for token in tokens if token is not None)


def _named(tokenizer: Tokenizer, name: str, flag: str) -> int:
    token = tokenizer.find(name)
    if token is None:
        raise DataError(
            f"{tokenizer.name} has no token {name!r}: name another one with {flag} (special tokens: "
            f"{_special_tokens(tokenizer)})"
        )
    return token


def _not_for_padding(tokenizer: Tokenizer, token: int, eos: int) -> str | None:
    """Return why a token cannot be that of padding."""
    if token == eos:
        return "is the end token, which is predicted"
    if token == tokenizer.unk_id:
        return "stands for unknown text"
    piece = tokenizer.piece(token)
    assert piece is not None
    return "occurs in texts" if token in tokenizer.encode_raw(piece, special=False) else None


def _special_tokens(tokenizer: Tokenizer) -> str:
    """Return the first special tokens, for messages."""
    names = [repr(tokenizer.piece(token)) for token in sorted(tokenizer.marked_ids)]
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "") or "none"
