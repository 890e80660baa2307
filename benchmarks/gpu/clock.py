"""Time and memory of calls on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# Written before every timed call, so that nothing of its input is left in the second cache (50 MB on an H100). It keeps
# the GPU busy for some 0.2 ms as well, in which the next call is launched: what is timed is the GPU's work.
FLUSHED_BYTES = 512 * 1024**2

Call = Callable[[], object]


class Pace(NamedTuple):
    """How long to measure: milliseconds of calls a turn, turns, and seconds after which no other turn begins."""

    milliseconds: float
    turns: int
    seconds: float


QUICK = Pace(1, 2, 0.5)
MOST_CALLS = 100


class Clock:
    """Times calls on a device: with its events and an empty second cache, or, on a CPU, by the wall."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.on_cpu = device == "cpu"
        self.module: Any = None if self.on_cpu else getattr(torch, device)
        self.flushed = None if self.on_cpu else torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.on_cpu:
            self.module.synchronize()

    def first_seconds(self, call: Call) -> float:
        """Seconds of a first call by the wall: compilation and tuning included."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def milliseconds(self, call: Call, calls: int) -> list[float]:
        """Of each of some calls."""
        if self.flushed is None:
            return [1e3 * self.first_seconds(call) for _ in range(calls)]
        events = [[self.module.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in events:
            self.flushed.zero_()
            start.record()
            call()
            end.record()
        self.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def peak_bytes(self, call: Call) -> int | None:
        """Most memory a call holds above what was held before it; None on a CPU."""
        if self.on_cpu:
            return None
        self.synchronize()
        before = self.module.memory_allocated()
        self.module.reset_peak_memory_stats()
        call()
        self.synchronize()
        return self.module.max_memory_allocated() - before


def alternate(clock: Clock, calls: list[Call], pace: Pace) -> tuple[list[list[float]], int]:
    """Medians of each turn of the calls, which take turns; and how often the first was called."""
    counts = []
    for call in calls:
        estimate = statistics.median(clock.milliseconds(call, 2))
        counts.append(max(1, min(MOST_CALLS, round(pace.milliseconds / max(estimate, 1e-3)))))
    medians: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for turn in range(pace.turns):
        if turn and time.perf_counter() - start > pace.seconds:
            break
        for own, call, count in zip(medians, calls, counts, strict=True):
            own.append(statistics.median(clock.milliseconds(call, count)))
    return medians, counts[0] * len(medians[0])


def summarise(own: list[float], ours: list[float] | None) -> dict[str, float]:
    """Median, lowest and highest of the turns, and how many times our time they are, turn by turn."""
    summary = {
        "milliseconds": statistics.median(own),
        "milliseconds_lowest": min(own),
        "milliseconds_highest": max(own),
        "turns": len(own),
    }
    if ours is None:
        return summary
    ratios = [one / other for one, other in zip(own, ours, strict=True)]
    together = statistics.median(ours)
    return summary | {
        "sasa_milliseconds": together,
        "ratio_to_sasa": summary["milliseconds"] / together,
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
    }
