"""The command ``sasa study``."""

from __future__ import annotations

import sys

from .run import TrainingsFailed
from .run import study as run


def study(program: str, arguments: list[str]) -> int:
    """``sasa study``: a plan, and the folder for its runs. Exit status 1 means failed training runs, 2 a user error."""
    from ..train.command import run_function

    try:
        return run_function(program, run, arguments, positional=("plan",))
    except TrainingsFailed as failed:
        sys.stderr.write(f"{program}: {failed}\n")
        return 1
