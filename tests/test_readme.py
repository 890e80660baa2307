"""The README is true: its code runs, its links lead somewhere, its figures are those of the committed results."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks.readme import marks, table, with_tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_code_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(code.replace("torch.randn(32, 64, 56, 56)", "torch.randn(2, 64, 56, 56)"), names)
    assert names["w"].shape == (1, 8, 49, 56, 56)
    assert names["y"].shape == (2, 8, 16, 14, 14)
    assert isinstance(names["layer"], torch.nn.Module)


@pytest.mark.parametrize(
    "page", ["README.md", "docs/equation.md", "docs/differences.md", "docs/kernels.md", "CHANGELOG.md"]
)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("mark", marks(README))
def test_the_tables_are_those_of_the_committed_results(mark):
    assert f"<!-- {mark} table -->\n{table(mark)}\n<!-- end -->" in README


def test_tables_are_put_between_their_marks_only():
    text = "a\n<!-- demo table -->\nold\n<!-- end -->\nb"
    assert with_tables(text) == f"a\n<!-- demo table -->\n{table('demo')}\n<!-- end -->\nb"
    assert with_tables("no mark") == "no mark"
