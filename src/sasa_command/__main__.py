"""``python -m sasa_command`` writes the help of every command to ``help/``."""

import contextlib
import functools
import io
import os

from sasa.cli import COMMANDS, USAGE, main

from . import HELP


@functools.cache
def texts() -> dict[str, str]:
    """What each command's parser prints for ``--help``, by the command's name; ``sasa`` is the overview."""
    found = {"sasa": f"{USAGE}\n"}
    for command in COMMANDS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([command, "--help"])
        found[command] = printed.getvalue()
    return found


if __name__ == "__main__":
    os.environ["COLUMNS"] = "100"  # argparse fits its text to the terminal
    for name, text in texts().items():
        (HELP / f"{name}.txt").write_text(text, encoding="utf-8")
