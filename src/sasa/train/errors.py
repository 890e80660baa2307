"""Errors that the user can act on: the command line prints them without a traceback."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class UserError(Exception):
    """Base of the errors below."""


class DataError(UserError, ValueError):
    """Images that can't be used for training: the message names the folder or file."""


class OutputError(UserError, OSError):
    """An output folder that can't be used: the message names it."""


class OptionError(UserError, ValueError):
    """An option out of range: the message names it, what was expected and what was given."""


class NonFiniteLoss(UserError, ArithmeticError):  # noqa: N818
    """The loss is infinite or not a number: the message names the step, the batch's images and the last checkpoint."""


class Stopped(SystemExit):
    """A signal requested a stop, and the run was saved. The exit status is that of a process killed by the signal.

    143 for SIGTERM, SIGUSR1 and signals to other processes, 130 for Ctrl-C.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM))
        self.message = message

    def __str__(self) -> str:
        return self.message


def near(name: str, allowed: Iterable[str]) -> str:
    """The most similar allowed name, in brackets for a message; "" if none is similar."""
    found = difflib.get_close_matches(name, allowed, 1)
    return f" (did you mean {found[0]}?)" if found else ""
