"""Read remote files as blocks of bytes: over HTTP, from S3 and Google Cloud Storage, or from a command's output.

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
from functools import partial
from http.client import HTTPException, InvalidURL
from urllib.error import HTTPError
from urllib.request import urlopen

from ebwm_dist.errors import ConfigError, DataError, FetchError, UserError
from ebwm_dist.storage import open_storage, quoted, without_options

SCHEMES = ("http", "https", "s3", "gs")
_BLOCK = 1 << 23
_OPTIONS = re.compile(r"(?<=\w)\?[^\s'\"]+")  # of an address, however an exception quotes it
_HTTP_TIMEOUT = 60.0
"""Seconds without a byte after which an HTTP request has failed."""
_TEMPORARY = (408, 425, 429)
"""HTTP statuses below 500 with which a server asks for another try."""
_REFUSED = re.compile("ACCESS_DENIED|PERMISSION_DENIED|UNAUTHENTICATED|ACCESS_KEY_ID|SIGNATURE|EXPIRED_TOKEN")
"""Refusals by S3 and Google Cloud Storage, which have no exceptions of their own in pyarrow."""


class TransportError(Exception):
    """A file did not arrive, or not all of it; the message is the reason."""


def read_blocks(url: str) -> Iterator[bytes]:
    """Yield the content of `url` in blocks, all of it unless an exception ends it.

    A server that does not state a length can cut it off unnoticed: compare with the manifest.
    """
    if url.startswith("pipe:"):
        blocks = _run(shlex.split(url.removeprefix("pipe:")))
    else:
        blocks = _read_http(url) if url.startswith("http") else _read_object(url)
    try:
        yield from blocks
    except UserError:
        raise
    except FileNotFoundError:
        raise DataError(f"missing file: {shown(url)} does not exist; restore it, or correct data.path") from None
    except (ValueError, InvalidURL) as error:
        raise ConfigError(f"data.path = {shown(url)!r}: not an address of storage ({error})") from None
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


def _refusal(url: str, reason: str) -> FetchError:
    return FetchError(f"{shown(url)}: {reason}; check the address and your permissions")


def _read_http(url: str) -> Iterator[bytes]:
    try:
        with urlopen(quoted(url), timeout=_HTTP_TIMEOUT) as response:
            yield from iter(partial(response.read, _BLOCK), b"")
            if response.length:  # `read` ends silently where the connection does
                raise OSError(f"the connection ended {response.length:,} bytes too early")
    except HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError from None
        status = f"HTTP status {error.code} ({error.reason})"
        if error.code < 500 and error.code not in _TEMPORARY:
            raise _refusal(url, status) from None
        raise OSError(status) from None


def _read_object(url: str) -> Iterator[bytes]:
    storage, path = open_storage(url, "data.path")
    with storage.open_input_stream(path) as stream:
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
