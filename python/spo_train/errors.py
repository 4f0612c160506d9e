"""Failures whose message is meant for the user: the command line prints it instead of a traceback."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run cannot go on for a reason outside the program; `exit_code` is what the command ends with."""

    exit_code = 1


class CheckpointError(RunError):
    """A checkpoint could not be written or read; the message names the file and the reason."""


class NonFiniteLossError(RunError):
    """The loss or its gradient became NaN or infinite; the weights were not updated with it."""


class RunInterruptedError(RunError):
    """The run was asked to stop; its checkpoint is written and it can be resumed."""

    exit_code = 130
