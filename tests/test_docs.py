"""The code of the pages runs, and prints what they say."""

import re
from pathlib import Path

import pytest

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
