"""The command ``sasa``: help and version at once, without PyTorch, whose import takes seconds.

``help/`` holds what the parsers of ``sasa.cli`` print, written by ``python -m sasa_command``.
"""

from __future__ import annotations

import importlib.metadata
import os
import select
import sys
from pathlib import Path

STDOUT = 1
HELP = Path(__file__).parent / "help"


def main() -> int:
    """Run the command line; returns the exit status."""
    try:
        status = _run()
        sys.stdout.flush()
    except BrokenPipeError:
        if not _output_is_unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # Python flushes once more
        return 1
    return status


def _output_is_unread() -> bool:
    """Whether whatever read the standard output, such as ``head``, has ended."""
    poll = select.poll()
    poll.register(STDOUT, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _run() -> int:
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        print(importlib.metadata.version("sasa-torch"))
        return 0
    name = "sasa" if arguments[:1] in ([], ["-h"], ["--help"]) else arguments[0]
    path = HELP / f"{name}.txt"
    asked = name == "sasa" or arguments[1:] in (["-h"], ["--help"])
    if asked and name.isidentifier() and path.is_file():
        print(path.read_text(encoding="utf-8"), end="")
        return 0
    from sasa.cli import main

    return main(arguments)
