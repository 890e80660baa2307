"""What is measured: parts made of cases, cases made of peers, in order of importance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from .verify import TOLERANCES, Call

# Ranks, measured in this order: those needed for the targets; other shapes and precisions; compiled networks; the rest.
TARGET, SHAPES, COMPILED, REST = range(4)
MODES = ("forward", "training")
CONVOLUTION = "convolution 3x3"


class RefusedError(Exception):
    """A measurement that isn't possible, and why."""


class Device(NamedTuple):
    """Where measurements are made (cpu, cuda or xpu), and whether in small, without torch.compile."""

    name: str
    quick: bool = False

    @property
    def on_cpu(self) -> bool:
        """Whether there is no accelerator."""
        return self.name == "cpu"

    @property
    def implementation(self) -> str | None:
        """Our implementation: the GPU kernels, never a substitute; on a CPU, the default."""
        return None if self.on_cpu else "triton"


class Precision(NamedTuple):
    """A dtype, whether matrix products and convolutions may use tf32, and the largest difference that is rounding."""

    dtype: torch.dtype
    tf32: bool
    tolerance: float

    def allow(self) -> None:
        """Configure PyTorch, both for products and for cuDNN's convolutions (by default, only the latter use tf32)."""
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = self.tf32


PRECISIONS = {
    "bfloat16": Precision(torch.bfloat16, False, TOLERANCES[torch.bfloat16]),
    "tf32": Precision(torch.float32, True, 1e-2),
    "float32": Precision(torch.float32, False, TOLERANCES[torch.float32]),
}


@dataclass(frozen=True)
class Case:
    """What is compared: peers on a problem. Cases of one name and part are one in the results.

    Attributes:
        part: a key of ``registry.PARTS``.
        name: of the case.
        mode: ``"forward"``, ``"training"`` (forward and backward), or another of the part's.
        problem: a named tuple of sizes with a method ``tiny``.
        peers: their names.
        precision: a key of ``PRECISIONS``.
        rank: when it is measured, 0 first.
        compiled: whether everything in it runs under torch.compile.
        threads: of the CPU, if not all.
    """

    part: str
    name: str
    mode: str
    problem: Any
    peers: Sequence[str]
    precision: str = "float32"
    rank: int = TARGET
    compiled: bool = False
    threads: int | None = None

    def facts(self) -> dict[str, Any]:
        """For the results."""
        return {"case": self.name, "mode": self.mode, "precision": self.precision, **self.problem._asdict()}

    def checked(self, device: Device) -> Case:
        """The case whose results are checked: in small on a CPU, where the reference in float64 would take minutes."""
        return replace(self, problem=self.problem.tiny()) if device.on_cpu else self


class Step(NamedTuple):
    """One peer in one case."""

    case: Case
    peer: str


class Pace(NamedTuple):
    """How long to measure: seconds of calls per turn, turns, and seconds after which no further turn starts."""

    call_seconds: float
    turns: int
    seconds: float


CPU_PACE, GPU_PACE, QUICK_PACE = Pace(0.5, 3, 10), Pace(0.02, 5, 4), Pace(0.001, 2, 0.5)


@dataclass(frozen=True)
class Part:
    """One kind of thing that is measured.

    Attributes:
        cases: all of them, for a device.
        build: returns the call to measure; raises if it isn't possible.
        check: largest difference of a call's results from float64; raises unless it is rounding. None if nothing
            is comparable.
        figures: derived from the time.
        baseline: the peer that this one takes turns with.
        compiles: whether it takes long to start.
        summary: completes the results of the whole part.
        cpu_pace, gpu_pace: how long to measure.
    """

    cases: Callable[[Device], list[Case]]
    build: Callable[[Case, str, Device], Call]
    check: Callable[[Case, str, Call, Device], float | None]
    figures: Callable[[Case, str, dict[str, Any]], dict[str, Any]] = lambda case, peer, found: {}
    baseline: Callable[[str], str] = lambda peer: "sasa"
    compiles: Callable[[Case, str], bool] = lambda case, peer: case.compiled
    summary: Callable[[dict[str, Any]], None] = lambda result: None
    cpu_pace: Pace = CPU_PACE
    gpu_pace: Pace = GPU_PACE

    def pace(self, device: Device) -> Pace:
        """On a device."""
        return QUICK_PACE if device.quick else self.cpu_pace if device.on_cpu else self.gpu_pace
