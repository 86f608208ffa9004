"""The errors that a user can cause, each with the exit code that the command line returns for it."""


class QimeraError(Exception):
    """Something that the user can mend; the message names the setting or layer, what was given and what to do."""

    exit_code = 2


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
