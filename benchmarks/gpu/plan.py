"""What is measured, in the order in which it is wanted: when the time is up, the rest is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ..measure import Call
from .clock import Pace

# Ranks: what the targets need; attention and layer in other shapes and precisions; compiled networks; the rest.
TARGET, SHAPES, COMPILED, REST = range(4)


class RefusedError(Exception):
    """A measurement that can't be made, and why."""


@dataclass(frozen=True)
class Case:
    """What is compared: peers on a problem. Cases of one name and part are one in the results.

    Attributes:
        part: attention, layer or networks.
        name: of the case.
        mode: ``"forward"`` or ``"training"``.
        precision: a key of ``PRECISIONS``.
        problem: a named tuple of sizes.
        peers: their names.
        rank: when it is measured, 0 first.
        compiled: whether everything in it runs under torch.compile.
    """

    part: str
    name: str
    mode: str
    precision: str
    problem: Any
    peers: Sequence[str]
    rank: int = TARGET
    compiled: bool = False

    def facts(self) -> dict[str, Any]:
        """For the results."""
        return {"case": self.name, "mode": self.mode, "precision": self.precision, **self.problem._asdict()}


class Setting(NamedTuple):
    """Where measurements are made: the device, and whether in small, without torch.compile."""

    device: str
    quick: bool

    @property
    def implementation(self) -> str | None:
        """What sasa is told to compute with: the GPU's kernels, never a substitute; on a CPU, whatever is fastest."""
        return None if self.device == "cpu" else "triton"


class Part(Protocol):
    """A module that measures one kind of thing."""

    PACE: Pace

    def cases(self, quick: bool) -> list[Case]:
        """All of them."""
        ...

    def baseline(self, case: Case, peer: str) -> str:
        """The peer of ours that this one takes turns with."""
        ...

    def compiles(self, case: Case, peer: str) -> bool:
        """Whether it takes long to begin."""
        ...

    def build(self, case: Case, peer: str, setting: Setting) -> Call:
        """What is called; raises where that can't be."""
        ...

    def check(self, case: Case, peer: str, call: Call, setting: Setting) -> float | None:
        """Largest difference from float64; raises unless it is rounding. None where nothing is comparable."""
        ...

    def figures(self, case: Case, peer: str, found: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
        """What follows from the time."""
        ...


class Step(NamedTuple):
    """One peer in one case."""

    part: str
    case: Case
    peer: str


def plan(parts: dict[str, Part], quick: bool) -> list[Step]:
    """Every peer of every case, by rank; within a rank, part by part."""
    cases = [case for part in parts.values() for case in part.cases(quick)]
    return [Step(case.part, case, peer) for case in sorted(cases, key=lambda case: case.rank) for peer in case.peers]
