"""Time and memory of sasa beside its peers on the CPU: checks results, measures, prints, writes and draws.

    python -m benchmarks.run                      everything; writes to benchmarks/results/
    python -m benchmarks.run --only attention     one part: attention, layer, kept, stages, scaling, networks or calls
    python -m benchmarks.run --quick              small problems only, for trying it out; writes to runs/bench/

Every number but those of calls comes from a process of its own; what is compared takes turns. Numbers are medians of
the turns, ratios are of medians, with the lowest and highest ratio of the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from .machine import machine
from .one import PARTS
from .plots import draw
from .processes import ROOT
from .tables import ROWS, rich
from .targets import evaluate

RESULTS = ROOT / "benchmarks/results"
TRIED = ROOT / "runs/bench"
SAME_MACHINE = ("cpu", "capability", "threads", "torch")


def result_file(folder: Path, part: str) -> Path:
    """Where a part's results are; the targets' too."""
    return folder / ("targets.json" if part == "targets" else f"{part}-cpu.json")


def write(folder: Path, part: str, result: dict[str, Any]) -> None:
    """Write a part's results as JSON."""
    result_file(folder, part).write_text(json.dumps(result, indent=2) + "\n")


def read(folder: Path, here: dict[str, Any]) -> dict[str, Any]:
    """The results in a folder that were measured on this machine, by part."""
    files = {part: result_file(folder, part) for part in PARTS}
    found = {part: json.loads(path.read_text()) for part, path in files.items() if path.exists()}
    return {part: own for part, own in found.items() if all(own["machine"][key] == here[key] for key in SAME_MACHINE)}


def main() -> None:
    """Measure, print, write and draw; then compare what was measured here, now or before, with the targets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small problems only")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be repeated")
    parser.add_argument("--out", type=Path, help="folder for JSON and PNG files")
    options = parser.parse_args()
    folder = options.out or (TRIED if options.quick else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # so that compile times are those of a first time
        for part in options.only or PARTS:
            with console.status(part) as status:
                result = PARTS[part].run(options.quick, status.update)
            write(folder, part, result)
            draw(part, result, result_file(folder, part).with_suffix(".png"))
            console.print(rich(ROWS[part](result)))
    if not options.quick:  # small problems say nothing about them
        here = machine()
        result = {"machine": here, "targets": evaluate(read(folder, here))}
        write(folder, "targets", result)
        console.print(rich(ROWS["targets"](result)))
    console.print(f"wrote {folder}", highlight=False)


if __name__ == "__main__":
    main()
