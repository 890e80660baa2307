"""All parts, and the order in which their cases are measured: when time runs out, the rest is skipped."""

from __future__ import annotations

from collections.abc import Sequence

from . import attention, ceiling, exported, layer, networks, stem
from .cases import Device, Part, Step

PARTS: dict[str, Part] = {
    "ceiling": ceiling.PART,
    "attention": attention.PART,
    "layer": layer.PART,
    "kept": layer.KEPT_PART,
    "stem": stem.PART,
    "stages": attention.STAGE_PART,
    "scaling": attention.SCALING_PART,
    "networks": networks.PART,
    "calls": layer.CALLS_PART,
    "export": exported.PART,
}


def plan(parts: Sequence[str], device: Device) -> list[Step]:
    """Every peer of every case, by rank; within a rank, part by part."""
    cases = [case for name in parts for case in PARTS[name].cases(device)]
    return [Step(case, peer) for case in sorted(cases, key=lambda case: case.rank) for peer in case.peers]
