"""The process that measures: on a CPU one peer of one case, so that its peak memory is its own, on a GPU all of them.

    python -m benchmarks.worker '{"folder": "runs/bench", …}'      as the command starts it

A failure is written in place of its measurement. An error that leaves the device unusable, a crash, or a measurement
that does not end kills this process; the command then starts another, which resumes after it.
"""

from __future__ import annotations

import functools
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .cases import PRECISIONS, Case, Device, RefusedError, Step
from .clock import CpuClock, alternate, clock_of, summarise
from .registry import PARTS, plan
from .results import SKIPPED, Results
from .verify import Call

DEVICE_LOST = 75  # exit status: the device no longer responds in this process
SECONDS_TO_BEGIN = {False: 2, True: 45}  # time that must remain to start a measurement, by whether it compiles
SECONDS_OVER = 5  # how long a measurement may run past the deadline


@dataclass(frozen=True)
class Orders:
    """What a worker does.

    Attributes:
        folder: where the results are.
        device: cuda, xpu or cpu.
        quick: small problems, nothing compiled.
        parts: those to measure.
        deadline: when to stop, in seconds of ``time.time``; infinity for never.
        most_seconds: time after which a measurement is aborted, with the process; None for never.
    """

    folder: str
    device: str
    quick: bool
    parts: list[str]
    deadline: float = math.inf
    most_seconds: int | None = None

    def text(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @property
    def where(self) -> Device:
        """Device and size."""
        return Device(self.device, self.quick)

    def steps(self) -> list[Step]:
        """The measurements, in order."""
        return plan(self.parts, self.where)


class Prepared:
    """The calls of the current case; ours is kept for the peers that take turns with it."""

    def __init__(self, device: Device, clock: CpuClock) -> None:
        self.device, self.clock = device, clock
        self.case: Case | None = None
        self.calls: dict[str, tuple[Call, dict[str, Any]]] = {}

    def enter(self, case: Case) -> None:
        """Release the previous case."""
        if case != self.case:
            self.case, self.calls = case, {}
            torch.compiler.reset()  # compiled functions share a small cache
            PRECISIONS[case.precision].allow()
            torch.set_num_threads(case.threads or torch.get_num_threads())
            self.clock.clean()

    def call(self, case: Case, peer: str) -> tuple[Call, dict[str, Any]]:
        """A peer's call, after checking its results and running it once, and what was found on the way."""
        if peer in self.calls:
            return self.calls[peer]
        part, checked, found = PARTS[case.part], case.checked(self.device), {}
        call = part.build(checked, peer, self.device)
        found["first_call_seconds"] = self.clock.first_seconds(call)
        difference = part.check(checked, peer, call, self.device)
        if checked is not case:
            call = part.build(case, peer, self.device)
            found["first_call_seconds"] = self.clock.first_seconds(call)
        if difference is not None:
            found["largest_difference"] = difference
        peak = self.clock.peak_bytes(call)
        if peak is not None:
            found["peak_gigabytes"] = peak / 1e9
        if peer == part.baseline(peer):
            self.calls[peer] = call, found
        return call, found


def reason(error: BaseException) -> str:
    """An error as one line."""
    words = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = words if isinstance(error, RefusedError) else f"{type(error).__name__}: {words}".removesuffix(": ")
    return text if len(text) <= 300 else text[:297] + "..."


def measure(step: Step, prepared: Prepared) -> dict[str, Any]:
    """Figures of a peer, taken in turns with its baseline; without a ratio if that can't run."""
    (case, peer), part = step, PARTS[step.case.part]
    prepared.enter(case)
    call, found = prepared.call(case, peer)
    calls, baseline = [call], part.baseline(peer)
    if baseline != peer:
        try:
            calls.append(prepared.call(case, baseline)[0])
        except Exception as error:  # ours; the peer still has a time
            found = found | {"no_ratio": reason(error)}
    medians, counts = alternate(prepared.clock, calls, part.pace(prepared.device))
    own = medians[0] if baseline == peer else medians[1] if len(medians) > 1 else None
    found = found | summarise(medians[0], own) | {"turns": len(medians[0]), "calls": counts[0]}
    return found | part.figures(case, peer, found)


def attempt(step: Step, prepared: Prepared) -> dict[str, Any]:
    """What was measured, or why it can't be."""
    try:
        return measure(step, prepared)
    except Exception as error:  # any: the others still have to be measured
        return {"cannot": reason(error)}


def usable(clock: CpuClock) -> bool:
    """Whether the device still responds."""
    try:
        clock.synchronize()
    except Exception:
        return False
    return True


def work(orders: Orders, say: Callable[[str], object]) -> int:
    """Measure what hasn't been measured yet; returns the exit status."""
    device, results = orders.where, Results(Path(orders.folder), orders.device)
    clock = clock_of(device)
    torch.backends.cudnn.benchmark = True
    prepared = Prepared(device, clock)
    for step in orders.steps():
        if results.has(step):
            continue
        compiles = PARTS[step.case.part].compiles(step.case, step.peer) and not device.quick
        left = orders.deadline - time.time()
        if left < SECONDS_TO_BEGIN[compiles]:
            figures = {"cannot": SKIPPED}
        else:
            results.begins(step)
            if orders.most_seconds is not None:
                signal.alarm(max(1, round(min(orders.most_seconds, left + SECONDS_OVER))))
            figures = attempt(step, prepared)
            if orders.most_seconds is not None:
                signal.alarm(0)
        results.ends(step, figures)
        say(f"{step.case.part}, {step.case.name}, {step.peer}: {in_a_line(figures)}")
        if "cannot" in figures and figures["cannot"] != SKIPPED:
            if not usable(clock):
                return DEVICE_LOST
            clock.clean()
        if device.on_cpu and not device.quick:
            break
    return 0


def in_a_line(figures: dict[str, Any]) -> str:
    """Figures of a peer."""
    if "cannot" in figures:
        return figures["cannot"]
    ratio = f", {figures['ratio']:.2f} times the baseline" if "ratio" in figures else ""
    return f"{1e3 * figures['seconds']:.4g} ms{ratio} (first call {figures['first_call_seconds']:.1f} s)"


if __name__ == "__main__":
    sys.exit(work(Orders(**json.loads(sys.argv[1])), functools.partial(print, flush=True)))
