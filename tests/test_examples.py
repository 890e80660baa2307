"""The examples run, and are short."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
PRINTED = {
    "convert": "loaded again, equal: True",
    "explore": "wrote page.html",
    "export": "outputs differ by at most",
    "layer": "step 30: loss",
    "predict": "labelled",
}


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs(path, tmp_path):
    """In a process of its own: other tests import, and register, what an example has to import itself."""
    done = subprocess.run([sys.executable, "-W", "error", path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert PRINTED[path.stem] in done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_is_short(path):
    assert len(path.read_text().splitlines()) <= 60
