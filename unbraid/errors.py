"""Errors that a user can fix, and exit statuses. Messages say what was given, what is allowed and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches

EXIT_USER_ERROR = 2
"""Exit status after a user error, or a run that a stop rule ended; one line on stderr says why."""

EXIT_STOPPED = 128
"""Exit status, plus the signal's number, of a command that a signal stopped."""


class UserError(ValueError):
    """Invalid input. The command line prints the message as one line on stderr and exits with status 2."""


class RecipeError(UserError):
    """A recipe, or a ``--set`` override, that cannot be used."""


class DataError(UserError):
    """A data set that cannot be used."""


class AudioError(UserError):
    """An audio file that cannot be read or written."""


class CheckpointError(UserError):
    """A checkpoint or run directory that cannot be used."""


class TrainingStopped(UserError):
    """A stop rule ended the run: too many faults, too many bad files, weights that differ or are not finite."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?``, or an empty string if no allowed name is close to the given one."""
    close = get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
