"""Errors that a user can cause, each with its exit code."""

import difflib
from collections.abc import Iterable, Sequence

_MAX_LISTED = 5


class QimeraError(Exception):
    """An error that the user can fix; its message names the setting or layer, the value and the remedy."""

    exit_code = 2
    is_told = False
    """Whether another process has already shown this error."""


class ConfigError(QimeraError):
    """A setting, path or argument is wrong (exit code 2)."""


class UnsupportedModelError(QimeraError):
    """The model cannot be captured, or offers nothing to synthesise samples from (exit code 3)."""

    exit_code = 3


class DivergenceError(QimeraError):
    """A loss became NaN or infinite; the message names the term and the step (exit code 4)."""

    exit_code = 4


class VerificationError(QimeraError):
    """A result failed its check (exit code 5)."""

    exit_code = 5


class PeerError(QimeraError):
    """Another process of the same run has ended (exit code 6)."""

    exit_code = 6


def enumerate_names(names: Sequence[str], nearest_in: Sequence[str] = ()) -> str:
    """Return the first few names, each with the closest one in ``nearest_in``, and how many more there are."""
    listed = [name + suggest(name, nearest_in, " (nearest: {})") for name in names[:_MAX_LISTED]]
    rest = len(names) - len(listed)
    return ", ".join(listed) + (f" and {rest} more" if rest else "")


def suggest(name: str, valid: Iterable[str], form: str = "; did you mean {}?") -> str:
    """Return ``form`` with the valid name closest to ``name``; empty if none is close."""
    nearest = difflib.get_close_matches(name, list(valid), n=1)
    return form.format(nearest[0]) if nearest else ""


def describe_value(value: object) -> str:
    """Return what kind of thing ``value`` is."""
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of type {type(value).__name__}"


def first_line(error: BaseException) -> str:
    """Return the first line of the message of ``error``, or its type if there is no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
