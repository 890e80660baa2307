"""The device's best performance: a copy within its memory, and a square matrix product in every precision."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .cases import PRECISIONS, Case, Device, Pace, Part
from .clock import with_rate
from .verify import Call

COPY, PRODUCT = "copy", "matrix product"


class CeilingProblem(NamedTuple):
    """Bytes that are copied, or the side of the matrices."""

    size: int

    def tiny(self) -> CeilingProblem:
        """Enough to load all code."""
        return self._replace(size=min(self.size, 64))


def cases(device: Device) -> list[Case]:
    """On a CPU only float32, since nothing here is compared with its tf32 and bfloat16."""
    copied, side = (2**20, 64) if device.quick else (2**31, 8192)
    if device.on_cpu:
        return [Case("ceiling", "product float32", "forward", CeilingProblem(min(side, 2048)), (PRODUCT,))]
    return [Case("ceiling", COPY, "forward", CeilingProblem(copied), (COPY,))] + [
        Case("ceiling", f"product {name}", "forward", CeilingProblem(side), (PRODUCT,), name) for name in PRECISIONS
    ]


def build(case: Case, peer: str, device: Device) -> Call:
    """A copy, or a product."""
    size = case.problem.size
    if peer == COPY:
        source = torch.randint(100, (size,), dtype=torch.int8, device=device.name)
        target = torch.empty_like(source)
        return lambda: (target.copy_(source),)
    a, b = torch.randn(2, size, size, device=device.name).to(PRECISIONS[case.precision].dtype)
    return lambda: (a @ b,)


def figures(case: Case, peer: str, found: dict[str, Any]) -> dict[str, float]:
    """Bytes read and written, or FLOPs, a second."""
    if peer == COPY:
        return with_rate("gigabytes_per_second", 2 * case.problem.size / 1e9, found)
    return with_rate("gflops", 2 * case.problem.size**3 / 1e9, found)


PART = Part(cases, build, lambda *_: None, figures, lambda peer: peer, gpu_pace=Pace(0.05, 5, 5))
