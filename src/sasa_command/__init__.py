"""The command ``sasa``: help and version at once, without PyTorch, whose import takes seconds.

``help/`` holds what the parsers of ``sasa.cli`` print, written by ``python -m sasa_command``.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

HELP = Path(__file__).parent / "help"


def main() -> int:
    """Run the command line; returns the exit status."""
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
