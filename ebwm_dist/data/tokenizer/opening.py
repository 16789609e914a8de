"""Open a tokenizer: one that somebody has, or one that is stored with shards, a run or an export."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ebwm_dist.data.tokenizer.choosing import choose_special_tokens
from ebwm_dist.data.tokenizer.interface import SpecialTokens, Tokenizer
from ebwm_dist.errors import DataError
from ebwm_dist.files import printable

if TYPE_CHECKING:
    from ebwm_dist.data.format.manifest import Manifest  # it needs numpy, which a tokenizer does without

JSON_FILE, MODEL_FILE = "tokenizer.json", "tokenizer.model"
_CONFIGURATIONS = ("special_tokens_map.json", "tokenizer_config.json")  # what the later says counts


def open_tokenizer(
    path: str | Path,
    *,
    eos_token: str | None = None,
    pad_token: str | None = None,
    allow_special: bool = False,
    content: bytes | None = None,
) -> Tokenizer:
    """Open a sentencepiece model, a `tokenizer.json`, or a folder that transformers has saved.

    Args:
        path: the file or folder.
        eos_token: the end token's name; None: found by the configuration in the folder, by the model, or by its name.
        pad_token: the pad token's name; None: found in the same way, or an id that is added.
        allow_special: let special tokens that occur in a text be tokens; else they are text.
        content: what the file holds, if it is known.

    Raises:
        DataError: it cannot be read, or has no such tokens; the message says what to do.
    """
    path = Path(path)
    file = _file_in(path) if path.is_dir() else path
    try:
        content = file.read_bytes() if content is None else content
    except OSError as error:
        raise DataError(
            f"tokenizer {printable(file)} cannot be read ({error.strerror}); make one with "
            "data_tools/train_tokenizer.py --out PATH"
        ) from None
    tokenizer = _open(file, content, None)
    configured = _configured(file.parent) if file.name in (JSON_FILE, MODEL_FILE) else {}
    choose_special_tokens(tokenizer, eos_token, pad_token, configured, allow_special)
    return tokenizer


def reopen_tokenizer(path: Path, special: SpecialTokens, content: bytes | None = None) -> Tokenizer:
    """Open a stored tokenizer with the special tokens that were chosen for it; `content` is that of its file."""
    try:
        content = path.read_bytes() if content is None else content
    except OSError as error:
        raise DataError(f"tokenizer {printable(path)} cannot be read ({error.strerror}); restore it") from None
    return _open(path, content, special)


def load_tokenizer(manifest: Manifest) -> Tokenizer:
    """Open the tokenizer beside the shards, refusing one that the shards were not made with."""
    stored = manifest.token_format
    content = manifest.read_tokenizer() if manifest.remote else None
    path = manifest.folder / stored.tokenizer
    tokenizer = reopen_tokenizer(path, SpecialTokens.of(asdict(stored)), content)
    manifest.check_tokenizer(tokenizer.sha256, str(tokenizer.path))
    return tokenizer


def _open(path: Path, content: bytes, special: SpecialTokens | None) -> Tokenizer:
    """Return the tokenizer of a file by its content; a library is imported where it is needed."""
    if content.lstrip()[:1] == b"{":
        from ebwm_dist.data.tokenizer.json_file import JsonTokenizer

        return JsonTokenizer(path, content, special)
    from ebwm_dist.data.tokenizer.sentencepiece_model import SentencePieceTokenizer

    return SentencePieceTokenizer(path, content, special)


def _file_in(folder: Path) -> Path:
    """Return the file of a folder that transformers, or a published model, has a tokenizer in."""
    for name in (JSON_FILE, MODEL_FILE):
        if (folder / name).is_file():
            return folder / name
    parts = [name for name in ("vocab.json", "merges.txt", "vocab.txt") if (folder / name).is_file()]
    if parts:
        described = any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json"))
        kind = "AutoTokenizer" if described else "GPT2Tokenizer" if "merges.txt" in parts else "BertTokenizer"
        raise DataError(
            f"tokenizer {printable(folder)} is only in parts ({', '.join(parts)}): convert it with python -c "
            f'"import transformers as t; t.{kind}.from_pretrained({printable(folder)!r}).save_pretrained('
            "'converted')\", then give the folder converted"
        )
    raise DataError(f"folder {printable(folder)} has neither {JSON_FILE} nor {MODEL_FILE}: name a tokenizer")


def _configured(folder: Path) -> dict[str, str]:
    """Return the names of tokens by `eos`, `pad` and `bos` that transformers' files in a folder have."""
    names: dict[str, str] = {}
    for file in (folder / name for name in _CONFIGURATIONS):
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text("utf-8"))
            if not isinstance(content, dict):
                raise ValueError("not an object")
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{printable(file)} cannot be read ({error}): restore it, or delete it") from None
        for role in ("eos", "pad", "bos"):
            token = content.get(f"{role}_token")
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                names[role] = token
    return names
