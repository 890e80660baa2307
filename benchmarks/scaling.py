"""Whether attention's time is linear: in the pixels at one window, and in the window's taps at one image.

    python -m benchmarks.one scaling pixels sasa      one series

A series is measured in one process. What should be constant, seconds a pixel or seconds a pixel and tap, is given
relative to the median of its series.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sasa.ops.implementations import choose

from .attention import call, check
from .machine import machine
from .measure import measure
from .problems import SERIES, AttentionProblem
from .processes import Figures, take_turns

CHOSEN, QUICK = ("pixels", "taps"), ("small pixels", "small taps")
# The plain PyTorch implementation holds k² logits a pixel: tens of gigabytes beyond this many pixels.
MOST_PIXELS_OF_EAGER = 1024**2


def series(name: str) -> list[AttentionProblem]:
    """The problems of a series that this machine's implementation has the memory for."""
    kernel = choose(None, torch.empty(1, 1, 1, 1, 1)).name != "eager"
    return [p for p in SERIES[name] if kernel or p.size**2 <= MOST_PIXELS_OF_EAGER]


def measured(case: str, peer: str) -> dict[str, Any]:
    """Seconds of every problem of a series, in this process, once results are checked."""
    problems = series(case)
    for small in {problem.tiny() for problem in problems}:
        check(peer, small, "forward")
    return {"seconds": [measure(call(peer, problem, "forward"))["seconds"] for problem in problems]}


def share(name: str, problem: AttentionProblem) -> int:
    """Pixels of the problem, or pixels times taps: what its time should be proportional to."""
    pixels = problem.batch * problem.size**2
    return pixels if "pixels" in name else pixels * problem.kernel_size**2


def relative(seconds: Sequence[float], shares: Sequence[int]) -> list[float]:
    """Seconds a share, relative to their median."""
    each = [second / share for second, share in zip(seconds, shares, strict=True)]
    return [second / statistics.median(each) for second in each]


def deviation(values: Sequence[float]) -> float:
    """The largest distance from 1."""
    return max(abs(value - 1) for value in values)


def summarise(name: str, problems: Sequence[AttentionProblem], turns: Sequence[Figures]) -> dict[str, Any]:
    """Median times of a series, what they are relative to linear ones, and the spread of that over the turns."""
    shares = [share(name, problem) for problem in problems]
    seconds = [statistics.median(times) for times in zip(*(turn["seconds"] for turn in turns), strict=True)]
    deviations = [deviation(relative(turn["seconds"], shares)) for turn in turns]
    return {
        "points": [
            {**problem._asdict(), "seconds": second, "seconds_per_share": second / part, "relative": value}
            for problem, second, part, value in zip(problems, seconds, shares, relative(seconds, shares), strict=True)
        ],
        "deviation": deviation(relative(seconds, shares)),
        "deviation_lowest": min(deviations),
        "deviation_highest": max(deviations),
    }


def run(quick: bool, say: Callable[[str], object]) -> dict[str, Any]:
    """Both series."""
    names = QUICK if quick else CHOSEN
    turns = take_turns("scaling", [(name, "sasa") for name in names], say, quick)
    found = {name.removeprefix("small "): summarise(name, series(name), turns[name, "sasa"]) for name in names}
    return {"machine": machine(), "series": found}
