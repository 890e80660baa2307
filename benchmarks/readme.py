"""Writes the tables of README and docs/, and the plot of README, from the committed results.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from . import detection, explorer, limits, scale, tables, tiles
from .evidence import report as evidence
from .fine_tune import report as fine_tuning
from .machine import ROOT
from .plots import draw_highlights
from .results import RESULTS, Results

AVX2 = RESULTS / "avx2"
NOTHING = "Nothing has been measured on a GPU yet."
STUDIES = ("widths", "bccd")


def gpu_tables() -> str:
    """Everything measured on a device, part by part."""
    found = Results(RESULTS, "cuda").found
    if not found:
        return NOTHING
    shown = [tables.targets_table(found, "cuda"), *(tables.part_table(part, found) for part in found)]
    return "\n\n".join(tables.markdown(table) for table in shown if table.rows)


def table(mark: str) -> str:
    """What belongs between ``<!-- … table -->`` and ``<!-- end -->``."""
    special: dict[str, Callable[[], tables.Listing]] = {
        "demo": lambda: tables.demo_table(json.loads((ROOT / "docs/demo/results.json").read_text())),
        "detection": lambda: detection.listing(json.loads(detection.FILE.read_text())["cpu"]),
        "explorer": lambda: explorer.listing(json.loads(explorer.FILE.read_text())),
        "limits": lambda: limits.listing(json.loads(limits.FILE.read_text())),
        "scale": lambda: scale.listing(json.loads(scale.FILE.read_text())),
        "highlights": lambda: tables.highlights(Results(RESULTS, "cpu").found),
        "tiles": lambda: tiles.listing(json.loads(tiles.FILE.read_text())),
        "targets": lambda: tables.targets_table(Results(RESULTS, "cpu").found, "cpu", Results(AVX2, "cpu").found),
    }
    if mark == "gpu":
        return gpu_tables()
    if mark in STUDIES:
        study = ROOT / "docs/studies" / mark / "table.md"
        return study.read_text().partition("\n\n")[2].strip()  # without its title
    if mark.startswith("evidence_"):
        return evidence.table(mark.removeprefix("evidence_"))
    if mark.startswith("fine_tuning_"):
        return fine_tuning.table(mark.removeprefix("fine_tuning_"))
    make = special.get(mark, lambda: tables.part_table(mark, Results(RESULTS, "cpu").found))
    return tables.markdown(make())


def marks(text: str) -> list[str]:
    """The tables for which a text has markers."""
    return re.findall(r"<!-- (\w+) table -->", text)


def pages() -> list[Path]:
    """README and all files in docs/ that have such markers."""
    return [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if marks(page.read_text())]


def with_tables(text: str) -> str:
    """The text with its tables inserted between their markers."""
    for mark in marks(text):
        begin, end = f"<!-- {mark} table -->\n", "<!-- end -->"
        whole = f"{begin}{table(mark)}\n{end}"
        text = re.sub(f"{begin}.*?{end}", lambda _, whole=whole: whole, text, count=1, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    draw_highlights(Results(RESULTS, "cpu").found, RESULTS / "highlights-cpu.png")
    for page in pages():
        page.write_text(with_tables(page.read_text()))
