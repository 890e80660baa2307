"""The process that measures, one peer of one case after the other, until all is done or the time is up.

    python -m benchmarks.gpu.worker '{"folder": "runs/gpu", …}'      as the command starts it

Whatever goes wrong with a measurement is written in its place. What an error leaves the device unusable after, a crash
and a measurement that does not end kill this process; the command then starts another, which goes on behind it.
"""

from __future__ import annotations

import functools
import gc
import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import attention, layer, machine, networks
from .clock import QUICK, Clock, alternate, summarise
from .plan import Call, Case, Part, RefusedError, Setting, Step, plan
from .precision import PRECISIONS
from .results import SKIPPED, Results

PARTS: dict[str, Part] = {"attention": attention, "layer": layer, "networks": networks}
DEVICE_LOST = 75  # exit status: the device answers nothing any more, in this process
SECONDS_TO_BEGIN = {False: 2, True: 45}  # time that must be left to begin a measurement, by whether it compiles
SECONDS_OVER = 5  # how long a measurement may go on behind the deadline


@dataclass(frozen=True)
class Orders:
    """What a worker is told.

    Attributes:
        folder: where the results are.
        device: cuda, xpu or cpu.
        quick: small problems, nothing compiled.
        parts: those to measure.
        deadline: when to stop, in seconds of ``time.time``.
        most_seconds: after which a measurement is given up, and the process with it; None for never.
    """

    folder: str
    device: str
    quick: bool
    parts: list[str]
    deadline: float
    most_seconds: int | None = None

    def text(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @property
    def setting(self) -> Setting:
        """Device and size."""
        return Setting(self.device, self.quick)

    def steps(self) -> list[Step]:
        """What is to be measured, in order."""
        return plan({name: part for name, part in PARTS.items() if name in self.parts}, self.quick)


class Prepared:
    """The calls of the case at hand, ours kept for the peers that take turns with it."""

    def __init__(self, setting: Setting, clock: Clock) -> None:
        self.setting, self.clock = setting, clock
        self.case: Case | None = None
        self.calls: dict[str, tuple[Call, dict[str, Any]]] = {}

    def enter(self, case: Case) -> None:
        """Let go of the case before."""
        if case != self.case:
            self.case, self.calls = case, {}
            torch.compiler.reset()  # compiled functions share a small cache
            PRECISIONS[case.precision].allow()
            clean(self.setting)

    def call(self, case: Case, peer: str) -> tuple[Call, dict[str, Any]]:
        """A peer's call once it has run and its results are right, and what was found on the way."""
        if peer in self.calls:
            return self.calls[peer]
        part = PARTS[case.part]
        call = part.build(case, peer, self.setting)
        found: dict[str, Any] = {"first_call_seconds": self.clock.first_seconds(call)}
        difference = part.check(case, peer, call, self.setting)
        if difference is not None:
            found["largest_difference"] = difference
        peak = self.clock.peak_bytes(call)
        if peak is not None:
            found["peak_gigabytes"] = peak / 1e9
        if peer.startswith("sasa"):
            self.calls[peer] = call, found
        return call, found


def clean(setting: Setting) -> None:
    """Give back the memory that nothing holds."""
    gc.collect()
    if setting.device != "cpu":
        getattr(torch, setting.device).empty_cache()


def reason(error: BaseException) -> str:
    """An error in a line."""
    words = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = words if isinstance(error, RefusedError) else f"{type(error).__name__}: {words}".removesuffix(": ")
    return text if len(text) <= 300 else text[:297] + "..."


def measure(step: Step, prepared: Prepared, machine_: dict[str, Any]) -> dict[str, Any]:
    """Figures of a peer, taken in turns with ours; without a ratio if ours can't run."""
    part, setting, clock = PARTS[step.part], prepared.setting, prepared.clock
    prepared.enter(step.case)
    call, found = prepared.call(step.case, step.peer)
    baseline = part.baseline(step.case, step.peer)
    calls = [call]
    if baseline != step.peer:
        try:
            calls.append(prepared.call(step.case, baseline)[0])
        except Exception as error:  # ours; the peer still has a time
            found = found | {"no_ratio": reason(error)}
    medians, count = alternate(clock, calls, QUICK if setting.quick else part.PACE)
    own = medians[0] if baseline == step.peer else medians[1] if len(medians) > 1 else None
    found = found | summarise(medians[0], own) | {"calls": count}
    return found | part.figures(step.case, step.peer, found, machine_)


def attempt(measurement: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or why it can't be."""
    try:
        return measurement()
    except Exception as error:  # any: the others are still to be measured
        return {"cannot": reason(error)}


def usable(clock: Clock) -> bool:
    """Whether the device still answers."""
    try:
        clock.synchronize()
    except Exception:
        return False
    return True


def work(orders: Orders, say: Callable[[str], object]) -> int:
    """Measure what isn't measured yet; the exit status."""
    setting, results = orders.setting, Results(Path(orders.folder))
    clock = Clock(setting.device)
    torch.backends.cudnn.benchmark = True
    if "copy_bytes_per_second" not in results.found.get("machine", {}):
        results.describe(machine.identity(setting), orders.parts)
        results.describe(results.found["machine"] | attempt(lambda: machine.measured(clock, setting)), orders.parts)
        say(f"machine: {machine.in_words(results.found['machine'])}")
    prepared = Prepared(setting, clock)
    for step in orders.steps():
        if results.has(step):
            continue
        needed = SECONDS_TO_BEGIN[PARTS[step.part].compiles(step.case, step.peer) and not setting.quick]
        left = orders.deadline - time.time()
        if left < needed:
            figures = {"cannot": SKIPPED}
        else:
            results.begins(step)
            if orders.most_seconds is not None:
                signal.alarm(max(1, round(min(orders.most_seconds, left + SECONDS_OVER))))
            figures = attempt(functools.partial(measure, step, prepared, results.found["machine"]))
            if orders.most_seconds is not None:
                signal.alarm(0)
        results.ends(step, figures)
        say(f"{step.part}, {step.case.name}, {step.peer}: {in_words(figures)}")
        if "cannot" in figures and figures["cannot"] != SKIPPED:
            if not usable(clock):
                return DEVICE_LOST
            clean(setting)
    return 0


def in_words(figures: dict[str, Any]) -> str:
    """Figures in a line."""
    if "cannot" in figures:
        return figures["cannot"]
    ratio = f", {figures['ratio_to_sasa']:.2f} times sasa" if "ratio_to_sasa" in figures else ""
    return f"{figures['milliseconds']:.4g} ms{ratio} (first call {figures['first_call_seconds']:.1f} s)"


if __name__ == "__main__":
    sys.exit(work(Orders(**json.loads(sys.argv[1])), functools.partial(print, flush=True)))
