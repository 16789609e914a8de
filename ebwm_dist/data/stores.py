"""List files in storage: those of an address of s3://, gs://, hf:// or http(s)://, with their sizes and versions.

A version changes with the content. It is the hash of the content on the Hub, where all files of a listing are those of
one commit; the entity tag, or else the time of the last change, on a web server; and this time in object storage.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, unquote

from ebwm_dist.data.transport import (
    SCHEMES,
    TransportError,
    base_name,
    credentials_of,
    explained,
    open_http,
    open_hub,
    open_objects,
    shown,
)
from ebwm_dist.errors import FetchError, UserError
from ebwm_dist.storage import check_address

_WILDCARD = re.compile(r"(\*+|\[[^]/]+\])")


@dataclass(frozen=True)
class StoredFile:
    """A file in storage: its name within the folder that was listed, its address, and size and version if known."""

    name: str
    address: str
    size: int | None
    version: str | None


def list_files(address: str, key: str) -> tuple[list[StoredFile], bool]:
    """Return the file at `address`, or those below it, in order of their names, and whether `address` is not a file.

    An address may have wildcards `*`, `**` and `[...]`: then it stands for all files and folders that it matches.

    Raises:
        ConfigError: it is not an address; messages say that it was given as `key`.
        DataError: there is nothing at it.
        UserError: it stands for many files of a web server, which lists none.
        FetchError: the storage cannot be reached, or refuses.
    """
    scheme, _, rest = address.partition("://")
    if scheme not in SCHEMES:
        allowed = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise UserError(f"{key} {shown(address)} must be a path or one of {allowed}")
    check_address(address, key)
    path, mark, options = rest.partition("?")
    parts = path.rstrip("/").split("/")
    fixed = next((number for number, part in enumerate(parts) if _WILDCARD.search(part)), None)
    try:
        with explained(address, key):
            if scheme.startswith("http"):
                return _of_server(address, key, fixed is not None or path.endswith("/")), False
            list_folder = _of_hub if scheme == "hf" else _of_storage
            if fixed is None:
                return list_folder(address, key)
            folder = f"{scheme}://{'/'.join(parts[:fixed])}{mark}{options}"
            files, pattern = list_folder(folder, key)[0], _pattern(parts[fixed:])
            return [file for file in files if pattern.fullmatch(f"{file.name}/")], True
    except TransportError as error:
        where = credentials_of(address)
        checked = f"the address, the network and your credentials{where}" if where else "the address and the network"
        raise FetchError(f"{shown(address)} cannot be reached: {error}; check {checked}") from None


def is_unchanged(file: StoredFile, key: str) -> bool:
    """Return whether a file has the size and version with which it was listed.

    Raises:
        TransportError: the storage cannot be reached.
        DataError: it is gone.
    """
    if file.address.startswith("hf:"):
        return True  # the file of one commit
    with explained(file.address, key):
        if file.address.startswith("http"):
            (now,) = _of_server(file.address, key, False)
        else:
            (now,), _ = _of_storage(file.address, key)
    return (now.size, now.version) == (file.size, file.version)


def _pattern(parts: Iterable[str]) -> re.Pattern[str]:
    """Return what matches `name/` if the parts of an address match the name or a folder that it is in."""
    pattern = ""
    for part in parts:
        if part == "**":
            pattern += "(?:[^/]+/)*"
        else:
            pattern += "".join(map(_translate, _WILDCARD.split(part))) + "/"
    return re.compile(f"{pattern}.*", re.DOTALL)


def _translate(text: str) -> str:
    if text.startswith("*"):
        return "[^/]*"
    if _WILDCARD.fullmatch(text):
        inner = text[1:-1].replace("\\", "\\\\").replace("[", "\\[")
        return f"[^{inner[1:]}]" if inner.startswith("!") else f"[{inner}]"
    return re.escape(unquote(text))


def _in_order(files: Iterator[StoredFile]) -> list[StoredFile]:
    return sorted(files, key=lambda file: file.name.split("/"))


def _of_server(address: str, key: str, many: bool) -> list[StoredFile]:
    if many:
        raise UserError(f"{key} {shown(address)}: a web server lists no files; name each one")
    with open_http(address) as response:
        version = response.headers["ETag"] or response.headers["Last-Modified"]
        return [StoredFile(unquote(base_name(address)), address, response.length, version)]


def _of_storage(address: str, key: str) -> tuple[list[StoredFile], bool]:
    from pyarrow.fs import FileInfo, FileSelector, FileType

    storage, path = open_objects(address, key)
    path = path.rstrip("/")
    about = storage.get_file_info(path)
    if about.type == FileType.NotFound:
        raise FileNotFoundError

    def stored(about: FileInfo, name: str, address: str) -> StoredFile:
        # In whole seconds: an object and a listing of it may state the same time more or less exactly.
        version = None if about.mtime is None else about.mtime.replace(microsecond=0).isoformat()
        return StoredFile(name, address, about.size, version)

    if about.type == FileType.File:
        return [stored(about, about.base_name, address)], False
    location, mark, options = address.partition("?")

    def files() -> Iterator[StoredFile]:
        for found in storage.get_file_info(FileSelector(path, recursive=True)):
            if found.type == FileType.File:
                name = found.path[len(path) + 1 :]
                yield stored(found, name, f"{location.rstrip('/')}/{quote(name)}{mark}{options}")

    return _in_order(files()), True


def _of_hub(address: str, key: str) -> tuple[list[StoredFile], bool]:
    with open_hub(address, key) as (storage, path):
        from huggingface_hub import HfApi
        from huggingface_hub.hf_file_system import HfFileSystemResolvedRepositoryPath

        place = storage.resolve_path(path)
        if not isinstance(place, HfFileSystemResolvedRepositoryPath):
            raise UserError(f"{key} {address} is not in a repository: name hf://datasets/OWNER/NAME/...")
        commit = (
            HfApi(storage.endpoint).repo_info(place.repo_id, revision=place.revision, repo_type=place.repo_type).sha
        )
        folder = f"{place.root.partition('@')[0]}@{commit}/{place.path_in_repo}".rstrip("/")
        found = storage.find(folder, detail=True)
        assert isinstance(found, dict)
    if not found:
        raise FileNotFoundError
    files = (
        StoredFile(name[len(folder) + 1 :], f"hf://{quote(name, safe='/@')}", about["size"], _content_hash(about))
        for name, about in found.items()
    )
    if list(found) == [folder]:
        return [replace(file, name=folder.rpartition("/")[2]) for file in files], False
    return _in_order(files), True


def _content_hash(about: dict[str, Any]) -> str:
    return str(about["lfs"]["sha256"] if about["lfs"] else about["blob_id"])
