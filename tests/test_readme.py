"""The README is true: its code runs, its links lead somewhere, its figures are those of the committed results."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks.readme import marks, pages, table, with_tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(code.replace("torch.randn(32, 64, 56, 56)", "torch.randn(2, 64, 56, 56)"), names)
    assert "16 converted to attention, 1 left alone" in capsys.readouterr().out
    assert isinstance(names["model"], torch.nn.Module)
    assert names["w"].shape == (1, 8, 49, 56, 56)
    assert names["y"].shape == (2, 8, 16, 14, 14)
    assert isinstance(names["layer"], torch.nn.Module)


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")), "CHANGELOG.md"]
)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_the_tables_are_those_of_the_committed_results(page):
    text = page.read_text()
    assert with_tables(text) == text


def test_targets_are_in_docs_and_not_in_the_readme():
    assert marks(README) == ["highlights"]
    assert len(re.findall(r"!\[", README)) <= 2
    assert "targets" in marks((ROOT / "docs/benchmarks.md").read_text())
    assert all(not (set(marks(README)) & set(marks(page.read_text()))) for page in pages()[1:])


def test_tables_are_put_between_their_marks_only():
    text = "a\n<!-- demo table -->\nold\n<!-- end -->\nb"
    assert with_tables(text) == f"a\n<!-- demo table -->\n{table('demo')}\n<!-- end -->\nb"
    assert with_tables("no mark") == "no mark"
