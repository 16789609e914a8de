"""Errors whose message is all a user needs: launchers print it as one line, without a traceback."""

import errno
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


class UserError(ValueError):
    """Something the user can put right; the message says what and how."""

    same_on_all_ranks = False
    """Whether every rank raises it alike, so that rank 0 can tell it for all."""


class ConfigError(UserError):
    """A configuration that cannot be run; the message names the key, the value and what is allowed."""

    same_on_all_ranks = True


class DataError(UserError):
    """Data that is missing, damaged or does not fit; the message names the shard and, where known, the key."""


class FetchError(UserError):
    """Remote data that cannot be fetched, though they may be intact; the message names address and reason."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or does not fit the run; the message names it."""


class PeerError(UserError):
    """Another rank has died or hangs; the message names the step and the rank."""


class RunLockedError(PeerError):
    """Another process trains into the same run folder."""


@contextmanager
def same_on_all_ranks() -> Iterator[None]:
    """Mark the errors of a block that every rank runs on the same input; the network is not the same on all."""
    try:
        yield
    except FetchError:
        raise
    except UserError as error:
        error.same_on_all_ranks = True
        raise


_REMEDIES = {
    errno.ENOSPC: "make room there, then start the same command again",
    errno.EDQUOT: "make room there, then start the same command again",
    errno.EACCES: "let this user read and write it, or name another place",
    errno.EPERM: "let this user read and write it, or name another place",
    errno.EROFS: "name a place that can be written",
}


def why_not_written(error: OSError, folder: Path, room: str = "make room there") -> tuple[str, str]:
    """Return why the operating system refuses to write, and what helps; nothing where that is not known.

    Args:
        error: of writing.
        folder: where it was written to; it may be gone.
        room: what helps on a full disk.
    """
    reason, number = error.strerror or str(error) or type(error).__name__, error.errno
    if number in (errno.ENOSPC, errno.EDQUOT):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        return f"{reason}, {shutil.disk_usage(there).free / 2**30:.2f} GiB are free there", room
    if number in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST):
        return reason, "something else has moved, deleted or replaced a folder there: put it right"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return reason, "let this user write there"
    return reason, ""


def as_line(error: UserError | OSError) -> str:
    """Return an error as a user reads it; one of the operating system names the file, the reason and what to do."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        files = [os.fsdecode(file) for file in (error.filename, error.filename2) if isinstance(file, (str, bytes))]
        remedy = _REMEDIES.get(error.errno or 0)
        text = ": ".join((" -> ".join(files), error.strerror)) if files else error.strerror
        text += f"; {remedy}" if remedy else ""
    return text


def run_tool(main: Callable[[], int | None]) -> NoReturn:
    """Run the `main` of a command-line tool and exit with its status.

    An error that the user can put right is one line, and so is one of the operating system (disk full, no permission).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names that are not UTF-8
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        sys.exit(f"error: {as_line(error)}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
