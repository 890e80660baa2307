"""Time and memory of calls: by wall clock and /proc on a CPU, by events and the allocator on a GPU."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .cases import Device, Pace

# Written before every timed call, to evict its input from the L2 cache (50 MB on an H100). It also keeps the GPU busy
# while the next call is launched, so that only the GPU's work is timed: it is written again until that is long enough.
FLUSHED_BYTES = 512 * 1024**2
MOST_FLUSHES = 30  # a network that is launched too slowly shall seem so
MOST_CALLS = 300


class CpuClock:
    """Times calls by the wall clock."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def clean(self) -> None:
        """Give back the memory that nothing holds."""
        gc.collect()

    def seconds(self, call: Callable[[], object], calls: int = 1) -> list[float]:
        """Of each of some calls."""
        found = []
        for _ in range(calls):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return found

    def first_seconds(self, call: Callable[[], object]) -> float:
        """Wall-clock seconds of a first call, compilation and tuning included."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Peak memory of a call above what was held before it; None if the system doesn't report it (not Linux)."""
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)  # glibc
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak
            before = _status("VmRSS")
            call()
            return _status("VmHWM") - before
        except (AttributeError, OSError):
            return None


class EventClock(CpuClock):
    """Times calls by the device's events, with its L2 cache flushed before each."""

    def __init__(self, device: str) -> None:
        self.module: Any = getattr(torch, device)
        self.flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
        self.flush_seconds = statistics.median(self._timed([1] * 5, self.flushed.zero_))

    def flushes(self, call: Callable[[], object]) -> int:
        """How many keep the device busy for twice as long as the host takes to launch the call."""
        self.synchronize()
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        self.synchronize()
        return max(1, min(MOST_FLUSHES, math.ceil(2 * host / self.flush_seconds)))

    def synchronize(self) -> None:
        """Wait for the device."""
        self.module.synchronize()

    def clean(self) -> None:
        """Give back the memory that nothing holds."""
        gc.collect()
        self.module.empty_cache()

    def seconds(self, call: Callable[[], object], calls: int = 1) -> list[float]:
        """Of each of some calls."""
        return self._timed([self.flushes(call)] * calls, call)

    def _timed(self, flushes: Sequence[int], call: Callable[[], object]) -> list[float]:
        """Seconds of calls, each after so many flushes."""
        events = [[self.module.Event(enable_timing=True) for _ in range(2)] for _ in flushes]
        for (start, end), count in zip(events, flushes, strict=True):
            for _ in range(count):
                self.flushed.zero_()
            start.record()
            call()
            end.record()
        self.synchronize()
        return [1e-3 * start.elapsed_time(end) for start, end in events]

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Peak memory of a call above what was held before it."""
        self.synchronize()
        before = self.module.memory_allocated()
        self.module.reset_peak_memory_stats()
        call()
        self.synchronize()
        return self.module.max_memory_allocated() - before


def clock_of(device: Device) -> CpuClock:
    """The device's."""
    return CpuClock() if device.on_cpu else EventClock(device.name)


def alternate(
    clock: CpuClock, calls: Sequence[Callable[[], object]], pace: Pace
) -> tuple[list[list[float]], list[int]]:
    """Median seconds of each turn of the calls, which take turns; and the total number of calls of each."""
    counts = [max(1, min(MOST_CALLS, round(pace.call_seconds / max(*clock.seconds(call), 1e-6)))) for call in calls]
    medians: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for turn in range(pace.turns):
        if turn and time.perf_counter() - start > pace.seconds:
            break
        for own, call, count in zip(medians, calls, counts, strict=True):
            own.append(statistics.median(clock.seconds(call, count)))
    return medians, [count * len(medians[0]) for count in counts]


def summarise(own: Sequence[float], baseline: Sequence[float] | None) -> dict[str, Any]:
    """Median, lowest and highest of the turns, and their ratios to the baseline's, turn by turn."""
    summary = {
        "seconds": statistics.median(own),
        "seconds_lowest": min(own),
        "seconds_highest": max(own),
        "turn_seconds": list(own),
    }
    if baseline is None:
        return summary
    ratios = [one / other for one, other in zip(own, baseline, strict=True)]
    return summary | {
        "ratio": summary["seconds"] / statistics.median(baseline),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
    }


def with_rate(name: str, amount: float, found: dict[str, Any]) -> dict[str, float]:
    """An amount per second: for the median turn, the slowest and the fastest."""
    ends = {"": "seconds", "_lowest": "seconds_highest", "_highest": "seconds_lowest"}
    return {name + end: amount / found[key] for end, key in ends.items()}


def _status(name: str) -> int:
    """A line of /proc/self/status, which is in kB (getrusage's peak would include the parent's)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":")]
    return int(line.split()[1]) * 1024
