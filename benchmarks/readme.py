"""Writes the tables of README and docs from the committed results: ``python -m benchmarks.readme``."""

from __future__ import annotations

import json
import re

from .fine_tune import report as fine_tuning
from .gpu import limits
from .gpu.results import Results
from .gpu.tables import section
from .processes import ROOT
from .run import RESULTS, result_file
from .scale import model as scale
from .scale.tables import TABLES as SCALE
from .tables import ROWS, markdown

PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / page for page in ("fine-tuning.md", "kernels.md", "scale.md", "studies.md")),
]
STUDY = ROOT / "docs/studies/widths/table.md"


def demo_table() -> str:
    """Rows of docs/demo/results.json."""
    lines = ["| network | top-1 | parameters | MFLOPs an image | seconds an epoch |", "|---|---|---|---|---|"]
    for run in json.loads((ROOT / "docs/demo/results.json").read_text()):
        figures = f"{run['top1']:.1%} | {run['parameters']:,} | {run['flops'] / 1e6:.2f}"
        lines.append(f"| {run['model']} | {figures} | {run['seconds_per_epoch']:.1f} |")
    return "\n".join(lines)


def table(mark: str) -> str:
    """The table that belongs between the mark ``<!-- … table -->`` and ``<!-- end -->``."""
    if mark == "demo":
        return demo_table()
    if mark == "widths":
        return STUDY.read_text().partition("\n\n")[2].strip()  # without its title
    if mark == "gpu":
        return section(Results(RESULTS).found)
    if mark == "limits":
        return limits.table(json.loads(limits.FILE.read_text()))
    if mark.startswith("fine_tuning_"):
        return fine_tuning.table(mark.removeprefix("fine_tuning_"))
    if mark.startswith("scale_"):
        return SCALE[mark.removeprefix("scale_")](json.loads(scale.FILE.read_text()))
    return markdown(ROWS[mark](json.loads(result_file(RESULTS, mark).read_text())))


def marks(text: str) -> list[str]:
    """The tables that a text has marks for."""
    return re.findall(r"<!-- (\w+) table -->", text)


def with_tables(text: str) -> str:
    """The text with its tables put between their marks."""
    for mark in marks(text):
        begin, end = f"<!-- {mark} table -->\n", "<!-- end -->"
        whole = f"{begin}{table(mark)}\n{end}"
        text = re.sub(f"{begin}.*?{end}", lambda _, whole=whole: whole, text, count=1, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))
