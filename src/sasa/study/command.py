"""The command ``sasa study``."""

from __future__ import annotations

import sys

from .run import TrainingsFailed
from .run import study as run


def study(program: str, arguments: list[str]) -> int:
    """``sasa study``: a plan, and where its runs go. Exit status 1 means that trainings failed, 2 a mistake."""
    from ..train.command import run_function

    try:
        return run_function(program, run, arguments, positional=("plan",))
    except TrainingsFailed as failed:
        sys.stderr.write(f"{program}: {failed}\n")
        return 1
