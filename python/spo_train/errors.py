"""Failures that the user can mend: the command line prints their message without a traceback."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run cannot go on, for a reason outside the program. `exit_code` is the exit status of the command."""

    exit_code = 1


class CheckpointError(RunError):
    """A checkpoint could not be written or read; the message names the file and the reason."""


class NonFiniteLossError(RunError):
    """The loss or its gradient is NaN or infinite; the weights were not updated with it."""


class RunInterruptedError(RunError):
    """A signal stopped the run. Its checkpoint is written, so it can be resumed."""

    exit_code = 130


class MissingPackageError(RunError):
    """A package is not installed; the message says what needs it, and how to install it."""


class DataError(ValueError):
    """A data file holds nothing usable, or cannot be read as a whole."""


class RowError(ValueError):
    """A row of a data file cannot be used; the message is the reason, which names the field."""
