"""Addresses of storage, `scheme://bucket/path?name=value`, read as the URLs they are.

An address means one place exactly, or it is refused: `%23` is `#`, letters and spaces stand for themselves, and what a
parser would drop (`#fragment`) or fold (`//`, `.`) is an error, as two addresses would share a place.
"""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from ebwm_dist.errors import ConfigError, UserError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem


def without_options(address: str) -> str:
    """Return the part of an address that messages may name: its options may be a signature."""
    return address.partition("?")[0]


def is_address(text: str) -> bool:
    """Tell whether `text` starts with a scheme, as `s3://bucket` does; a path would be a folder named `s3:`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def local_path(text: str) -> Path:
    """Return a path of this machine: the type of command-line options that take no address."""
    if is_address(text):
        raise ArgumentTypeError(f"{without_options(text)!r} is an address; name a file or folder of this machine")
    return Path(text)


def check_new_folder(path: Path) -> None:
    """Raise a UserError unless a path is free for a new folder; an empty one may be there."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already: name a new folder, or delete it")


def check_address(address: str, key: str) -> None:
    """Raise a `ConfigError` naming `key` unless `address` means exactly one place; nothing is connected to."""
    scheme, _, rest = address.partition("://")
    path = without_options(rest)
    name = unquote(path).removesuffix("/")
    parts = (name.removeprefix("/") if scheme == "file" else name).split("/")
    problem = None
    if re.match(r"[^/]*:[^/]*@", path):
        # Named neither here nor in the run folder's config.yaml, where it would stay.
        raise ConfigError(f"{key}: the address holds a password; leave it out and put it into the environment")
    if "#" in rest:
        problem = "a URL ends where '#' is; write %23 for it"
    elif re.search(r"%(?![0-9a-fA-F]{2})", path):
        problem = "'%' must be followed by two hexadecimal digits; write %25 for it"
    elif scheme == "file" and not rest.startswith("/"):
        problem = "expected three slashes and a folder, as in file:///data"
    elif scheme in ("file", "hf") and "?" in rest:
        problem = "it has no options; write %3F for '?'"
    elif scheme in ("file", "s3", "gs", "hf") and any(part in ("", ".", "..") for part in parts):
        problem = "an empty part, '.' or '..' is not the name of a folder; leave it out"
    elif "\0" in name:
        problem = "%00 cannot be part of a name; leave it out"
    if problem is not None:
        raise ConfigError(f"{key} = {without_options(address)!r}: {problem}")


def quoted(address: str) -> str:
    """Return an address with letters and spaces written as URLs write them."""
    return quote(address, safe="%/:?&=@+,;$!*'()~")


def open_storage(address: str, key: str) -> tuple[FileSystem, str]:
    """Return the file system of an address of s3://, gs:// or file://, and the path in it.

    Raises:
        ConfigError: it is not such an address.
        OSError: the storage cannot be reached.
    """
    from pyarrow.fs import FileSystem

    check_address(address, key)
    try:
        storage, path = FileSystem.from_uri(quoted(address))
    except ValueError as error:
        raise ConfigError(f"{key} = {without_options(address)!r}: not an address of storage ({error})") from None
    return storage, path
