"""The README is true: its code runs, its links lead somewhere, its figures are those of the committed results."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks.readme import demo_table, layer_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_code_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(code.replace("torch.randn(32, 64, 56, 56)", "torch.randn(2, 64, 56, 56)"), names)
    assert names["w"].shape == (1, 8, 49, 56, 56)
    assert names["y"].shape == (2, 8, 16, 14, 14)
    assert isinstance(names["layer"], torch.nn.Module)


@pytest.mark.parametrize("page", ["README.md", "docs/equation.md", "docs/differences.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_the_tables_are_those_of_the_committed_results():
    assert demo_table() in README
    assert layer_table() in README
