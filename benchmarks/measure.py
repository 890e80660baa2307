"""Time and memory of one call in this process, and whether its result is right."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

ENOUGH_SECONDS = 1.5
MOST_CALLS = 30
# A call longer than this is not repeated, unless told otherwise.
SLOW_SECONDS = 1.0
# Largest difference from float64 that counts as rounding, relative to the largest number of the result. In bfloat16
# the logits themselves are rounded to 8 bits.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}

Call = Callable[[], tuple[Tensor, ...]]


def call_of(function: Callable[[], Tensor], mode: str, leaves: Sequence[Tensor], gradient: Tensor | None) -> Call:
    """The call to measure: the output; when ``mode`` is ``"training"``, also the gradients of the ``leaves``."""

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(),)

    def training() -> tuple[Tensor, ...]:
        output = function()
        return output.detach(), *torch.autograd.grad(output, leaves, gradient)

    return {"forward": forward, "training": training}[mode]


def largest_difference(
    results: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype, tolerance: float | None = None
) -> float:
    """Largest difference between results, relative to the largest number of each; raises unless it is rounding."""
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    differences = [
        ((result.double() - right.double()).abs().max() / right.double().abs().max()).item()
        for result, right in zip(results, expected, strict=True)
    ]
    if not all(difference <= tolerance for difference in differences):
        raise ArithmeticError(f"the results differ by {differences}, relative to their largest numbers")
    return max(differences)


def measure(
    call: Call, compiled: bool = False, least_calls: int = 3, slow_seconds: float = SLOW_SECONDS
) -> dict[str, float]:
    """Median seconds of a call, and the most memory the first one held above what the process held before it.

    Code that the first call loads counts as its memory, so run the same call on a tiny input before. A call that
    compiles itself is made once more: the compiler's memory is not the call's.
    """
    result = {}
    if compiled:
        result["compile_seconds"] = seconds_of(call)
    before = settled_bytes()
    first = seconds_of(call)
    result["peak_bytes"] = peak_bytes() - before
    if first <= slow_seconds:
        call()
    seconds = [seconds_of(call)]
    while not enough(seconds, least_calls, slow_seconds):
        seconds.append(seconds_of(call))
    return result | {"seconds": statistics.median(seconds), "calls": len(seconds)}


def enough(seconds: Sequence[float], least_calls: int, slow_seconds: float = SLOW_SECONDS) -> bool:
    """Whether these timings will do."""
    if not seconds:
        return False
    if seconds[0] > slow_seconds or len(seconds) >= MOST_CALLS:
        return True
    return len(seconds) >= least_calls and sum(seconds) >= ENOUGH_SECONDS


def seconds_of(call: Call) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def settled_bytes() -> int:
    """Memory the process holds once it has given back what it freed; the peak is counted from here on (Linux)."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        pass  # the peak then includes what came before, if that was more
    return _memory("VmRSS")


def peak_bytes() -> int:
    """Most memory the process has held since it last settled (getrusage's would include its parent's)."""
    return _memory("VmHWM")


def _memory(name: str) -> int:
    """A line of /proc/self/status, which is in kB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":")]
    return int(line.split()[1]) * 1024
