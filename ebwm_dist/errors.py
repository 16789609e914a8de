"""Errors whose message is all a user needs: launchers print it as one line, without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


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
