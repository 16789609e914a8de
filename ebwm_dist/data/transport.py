"""Read remote files as blocks of bytes: over HTTP, from S3, Google Cloud Storage or the Hub, or from a command.

Failures differ by type. TransportError: the storage did not answer, or not to the end, and may do so later. DataError:
the file does not exist. FetchError and ConfigError: the storage refuses the request, or the address is wrong.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException, HTTPResponse, InvalidURL
from typing import TYPE_CHECKING, NoReturn
from urllib.error import HTTPError
from urllib.parse import unquote
from urllib.request import urlopen

from ebwm_dist.errors import ConfigError, DataError, FetchError, UserError
from ebwm_dist.storage import check_address, open_storage, quoted, without_options

if TYPE_CHECKING:
    from huggingface_hub import HfFileSystem
    from pyarrow.fs import FileSystem

SCHEMES = ("http", "https", "s3", "gs", "hf")
_BLOCK = 1 << 23
_OPTIONS = re.compile(
    r"(?<=\w)\?[^\s'\"]+| error_info=\{.*"
)  # of an address, however quoted; details of Google's errors
_HTTP_TIMEOUT = 60.0
"""Seconds without a byte after which an HTTP request has failed."""
_GCS_RETRIES = 20
"""Seconds for which the library of Google Cloud Storage tries again by itself, unless the address says otherwise."""
_TEMPORARY = (408, 425, 429)
"""HTTP statuses below 500 with which a server asks for another try."""
_REFUSED = re.compile("ACCESS_DENIED|PERMISSION_DENIED|UNAUTHENTICATED|ACCESS_KEY_ID|SIGNATURE|EXPIRED_TOKEN")
"""Refusals by S3 and Google Cloud Storage, which have no exceptions of their own in pyarrow."""


_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "HF_TOKEN",
}
"""Where the credentials of an address come from, if the machine has none of its own."""


class TransportError(Exception):
    """A file did not arrive, or not all of it; the message is the reason."""


def read_blocks(url: str, key: str = "data.path") -> Iterator[bytes]:
    """Yield the content of `url` in blocks, all of it unless an exception ends it; messages say it was given as `key`.

    A server that does not state a length can cut it off unnoticed: compare with the manifest.
    """
    if url.startswith("pipe:"):
        blocks = _run(shlex.split(url.removeprefix("pipe:")))
    elif url.startswith("http"):
        blocks = _read_http(url)
    else:
        blocks = _read_hub(url, key) if url.startswith("hf:") else _read_object(url, key)
    with explained(url, key):
        yield from blocks


@contextmanager
def explained(url: str, key: str) -> Iterator[None]:
    """Turn the errors of a block that reads `url`, which was given as `key`, into those of this module."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        unless = ", or is private: see HF_TOKEN" if url.startswith("hf:") else ""
        raise DataError(f"missing file: {shown(url)} does not exist{unless}; restore it, or correct {key}") from None
    except (ValueError, InvalidURL) as error:
        raise ConfigError(f"{key} = {shown(url)!r}: not an address of storage ({error})") from None
    except (OSError, HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split()) or type(error).__name__
        reason = _OPTIONS.sub("", reason)
        if url.startswith(("s3:", "gs:")) and _REFUSED.search(reason):
            raise _refusal(url, reason) from None
        raise TransportError(reason) from None


def shown(url: str) -> str:
    """Return `url` for messages: without the options of an address, which may be a signature."""
    return url if url.startswith("pipe:") else without_options(url)


def base_name(url: str) -> str:
    """Return the name of the file at `url`."""
    return os.path.basename(shown(url)).strip("'")


def credentials_of(url: str) -> str:
    """Return where the credentials of an address come from, in brackets, if it needs any."""
    where = _CREDENTIALS.get(url.partition(":")[0])
    return f" ({where})" if where else ""


def _refusal(url: str, reason: str) -> FetchError:
    return FetchError(f"{shown(url)}: {reason}; check the address and your permissions{credentials_of(url)}")


def _raise_status(url: str, code: int, reason: str) -> NoReturn:
    """Raise the error of an HTTP status."""
    if code in (404, 410):
        raise FileNotFoundError
    status = f"HTTP status {code} ({reason})"
    if code < 500 and code not in _TEMPORARY:
        raise _refusal(url, status)
    raise OSError(status)


@contextmanager
def open_http(url: str) -> Iterator[HTTPResponse]:
    """Request a file of a web server."""
    try:
        with urlopen(quoted(url), timeout=_HTTP_TIMEOUT) as response:
            yield response
    except HTTPError as error:
        code, reason = error.code, error.reason
    else:
        return
    _raise_status(url, code, reason)


def _read_http(url: str) -> Iterator[bytes]:
    with open_http(url) as response:
        yield from iter(partial(response.read, _BLOCK), b"")
        if response.length:  # `read` ends silently where the connection does
            raise OSError(f"the connection ended {response.length:,} bytes too early")


@contextmanager
def open_hub(url: str, key: str) -> Iterator[tuple[HfFileSystem, str]]:
    """Open the file system of the Hub, or of the server at HF_ENDPOINT, and the path in it of an address of hf://."""
    check_address(url, key)
    try:
        from huggingface_hub import HfFileSystem, get_token
        from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]
    except ImportError:
        raise UserError(
            f"{key}: {shown(url)} needs huggingface_hub: pip install -c constraints.txt -e '.[hub]'"
        ) from None
    try:
        storage = HfFileSystem(endpoint=os.environ.get("HF_ENDPOINT"), token=get_token())
        yield storage, unquote(url.partition("://")[2]).rstrip("/")
    except HfHubHTTPError as error:
        failed = error
    except HTTPError as error:  # no OSError: the server cannot be reached
        raise OSError(str(error) or type(error).__name__) from None
    else:
        return
    _raise_status(url, failed.response.status_code, failed.response.reason_phrase)


def _read_hub(url: str, key: str) -> Iterator[bytes]:
    with open_hub(url, key) as (storage, path), storage.open(path, "rb", block_size=0) as stream:
        yield from iter(partial(stream.read, _BLOCK), b"")


def open_objects(url: str, key: str) -> tuple[FileSystem, str]:
    """Return the object storage of an address, which reports soon that it cannot be reached, and the path in it."""
    if url.startswith("gs:") and "retry_limit_seconds" not in url:
        url += (
            f"{'&' if '?' in url else '?'}retry_limit_seconds={_GCS_RETRIES}"  # its library's own limit is 15 minutes
        )
    return open_storage(url, key)


def _read_object(url: str, key: str) -> Iterator[bytes]:
    storage, path = open_objects(url, key)
    with storage.open_input_stream(path, compression=None) as stream:
        yield from iter(partial(stream.read, _BLOCK), b"")


def _run(command: list[str]) -> Iterator[bytes]:
    """Yield the standard output of `command`, which no shell interprets."""
    with tempfile.TemporaryFile() as messages:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages)
        except (FileNotFoundError, PermissionError):
            raise ConfigError(f"pipe: the command {command[0]!r} cannot be run; correct data.path") from None
        with process:
            assert process.stdout is not None
            yield from iter(partial(process.stdout.read, _BLOCK), b"")
        if process.returncode:
            messages.seek(0)
            last = messages.read().decode("utf-8", "replace").strip().splitlines()[-1:]
            raise OSError(": ".join([f"{shlex.join(command)} ended with status {process.returncode}", *last]))
