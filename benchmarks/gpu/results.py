"""The results of a run as one JSON file, written after every measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .machine import SAME
from .plan import Case, Step

NAME = "gpu.json"
MACHINE = "machine"
SKIPPED = "skipped: time"

Figures = dict[str, Any]


class Results:
    """What is in the file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        other = self.path.with_suffix(".part")
        other.write_text(json.dumps(self.found, indent=2) + "\n")
        other.replace(self.path)

    def begin(self, parts: list[str], everything: bool, facts: Figures) -> None:
        """Forget what is measured anew; the rest stays if only some parts are measured."""
        kept = {} if everything else {part: own for part, own in self.found.items() if part not in parts}
        before = kept.pop(MACHINE, {})
        self.found = kept | facts | {MACHINE: {key: before[key] for key in SAME if key in before}}
        self.save()

    def describe(self, machine: Figures, parts: list[str]) -> None:
        """The machine; parts measured on another one, or by other code, are dropped."""
        before = self.found.get(MACHINE, {})
        if any(before.get(key) != machine.get(key) for key in SAME):
            for part in [key for key, own in self.found.items() if isinstance(own, dict) and "cases" in own]:
                if part not in parts:
                    del self.found[part]
        self.found[MACHINE] = machine
        self.save()

    def cases(self, part: str) -> list[Figures]:
        """Those of a part."""
        return self.found.setdefault(part, {"cases": []})["cases"]

    def peers(self, case: Case) -> Figures:
        """The peers of a case, which is added where it isn't yet."""
        for entry in self.cases(case.part):
            if entry["case"] == case.name:
                return entry["peers"]
        entry = case.facts() | {"peers": {}}
        self.cases(case.part).append(entry)
        return entry["peers"]

    def has(self, step: Step) -> bool:
        """Whether it is measured, or known why not."""
        return step.peer in self.peers(step.case)

    def begins(self, step: Step) -> None:
        """Remember what is going on, should the process die of it."""
        self.peers(step.case)
        self.found["in_progress"] = [step.part, step.case.name, step.peer]
        self.save()

    def ends(self, step: Step, figures: Figures) -> None:
        """Keep the figures."""
        self.peers(step.case)[step.peer] = figures
        self.found.pop("in_progress", None)
        self.save()

    def blame(self, reason: str) -> bool:
        """Give the reason to what was going on; False if nothing was."""
        going_on = self.found.pop("in_progress", None)
        if going_on is None:
            return False
        part, name, peer = going_on
        (entry,) = [entry for entry in self.cases(part) if entry["case"] == name]
        entry["peers"][peer] = {"cannot": reason}
        self.save()
        return True
