"""The code of the pages runs, and prints what they say."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import timm
import torch

import sasa
from sasa_command import HELP

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("page", ["converting.md", "fine-tuning.md", "migrate.md"])
def test_the_code_runs_and_prints_what_the_page_says(page, capsys):
    text = (DOCS / page).read_text()
    names = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        capsys.readouterr()
        exec(code, names)
    (printed,) = re.findall(r"prints\n\n```text\n(.*?)```", text, re.DOTALL)
    assert capsys.readouterr().out == printed


PACKAGES = ["sasa", "sasa.models", "sasa.detection", "sasa.train", "sasa.study", "sasa.viz", "sasa.export"]
NOT_SHOWN = {"MODELS", "SmallResNetSize", "StudyError", "TrainingsFailed"}


def test_the_reference_has_every_public_name():
    shown = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    for package in PACKAGES:
        for name in importlib.import_module(package).__all__:
            assert name in NOT_SHOWN or re.search(rf":: {package}\.{name}$", shown, re.MULTILINE), f"{package}.{name}"


def test_the_reference_has_every_command():
    shown = (DOCS / "reference/command-line.md").read_text()
    for text in HELP.glob("*.txt"):
        assert f"help/{text.name}\n" in shown, text.name


SOURCES = Path(sasa.__file__).parent
EXAMPLES = sorted(path.relative_to(SOURCES.parent) for path in SOURCES.rglob("*.py") if ">>> " in path.read_text())


@pytest.mark.parametrize("path", EXAMPLES, ids=str)
def test_the_examples_of_docstrings_run(path):
    module = importlib.import_module(".".join(path.with_suffix("").parts))
    result = doctest.testmod(module, extraglobs={"sasa": sasa, "timm": timm, "torch": torch})
    assert result.attempted
    assert not result.failed
