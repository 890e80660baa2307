"""The command that takes the place of ``sasa train``; not in conftest.py, of which other processes may find another."""

import sys
from pathlib import Path

FAKE = [sys.executable, "-S", "-E", str(Path(__file__).parent / "fake_training.py")]
