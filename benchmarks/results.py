"""The results on a device: one JSON file per part, written after every measurement.

{"machine": …, "cases": [{"case", "mode", "precision", sizes, "peers": {name: figures}}]}; the figures of a peer that
can't be measured are {"cannot": why}.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .cases import Case, Step
from .machine import ROOT

RESULTS = ROOT / "benchmarks/results"
SKIPPED = "skipped: time"
IN_PROGRESS = "in_progress"

Figures = dict[str, Any]


class Results:
    """The contents of the files, by part."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self.found: dict[str, Figures] = {}
        self.read()

    def path(self, part: str, kind: str = "json") -> Path:
        """Of a part's file."""
        return self.folder / f"{part}-{self.device}.{kind}"

    def read(self) -> None:
        """Load the files."""
        ending = f"-{self.device}.json"
        files = sorted(self.folder.glob(f"*{ending}"))
        self.found = {path.name.removesuffix(ending): json.loads(path.read_text()) for path in files}

    def save(self, part: str) -> None:
        """Write the file atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.path(part, "partial")
        partial.write_text(json.dumps(self.found[part], indent=2) + "\n")
        partial.replace(self.path(part))

    def begin(self, parts: list[str], facts: Figures) -> None:
        """Discard what is to be measured again; other parts are kept."""
        for part in parts:
            self.found[part] = facts | {"cases": []}
            self.save(part)

    def peers(self, case: Case) -> Figures:
        """The peers of a case, which is added if missing."""
        cases = self.found[case.part]["cases"]
        for entry in cases:
            if entry["case"] == case.name:
                return entry["peers"]
        cases.append(case.facts() | {"peers": {}})
        return cases[-1]["peers"]

    def has(self, step: Step) -> bool:
        """Whether it has been measured, or the reason why not is known."""
        return step.peer in self.peers(step.case)

    def begins(self, step: Step) -> None:
        """Record what is being measured, in case the process dies."""
        self.peers(step.case)
        self.found[step.case.part][IN_PROGRESS] = [step.case.name, step.peer]
        self.save(step.case.part)

    def ends(self, step: Step, figures: Figures) -> None:
        """Store the figures."""
        self.peers(step.case)[step.peer] = figures
        self.found[step.case.part].pop(IN_PROGRESS, None)
        self.save(step.case.part)

    def blame(self, reason: str) -> None:
        """Record the reason for what was being measured."""
        for part, own in self.found.items():
            if IN_PROGRESS in own:
                name, peer = own.pop(IN_PROGRESS)
                (entry,) = [entry for entry in own["cases"] if entry["case"] == name]
                entry["peers"][peer] = {"cannot": reason}
                self.save(part)
