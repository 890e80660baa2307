"""Measurements in processes of their own that take turns, and what is made of their numbers.

A process of its own gives each measurement a peak memory of its own; turns make a busy moment of the machine hit all
that is compared.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TURNS, QUICK_TURNS = 3, 1
# Peers that take longer for a call, or must be compiled first, take one turn.
SLOW_SECONDS = 2.0

Figures = dict[str, Any]


def measured_alone(part: str, case: str, peer: str) -> Figures:
    """What ``python -m benchmarks.one`` reports; its error, if it fails."""
    command = [sys.executable, "-m", "benchmarks.one", part, case, peer]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ, check=False)
    if done.returncode:
        raise RuntimeError(f"{part}, {case}, {peer} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(
    part: str, pairs: Sequence[tuple[str, str]], say: Callable[[str], object], quick: bool = False
) -> dict[tuple[str, str], list[Figures]]:
    """The figures of every (case, peer), one a turn. A slow peer, or one that can't do the case, is asked once."""
    turns = QUICK_TURNS if quick else TURNS
    figures: dict[tuple[str, str], list[Figures]] = {pair: [] for pair in pairs}
    for turn in range(turns):
        for pair, own in figures.items():
            if not own or not needs_one_turn(own[-1]):
                say(f"{part}, {', '.join(pair)}: turn {turn + 1} of {turns}")
                own.append(measured_alone(part, *pair))
    return figures


def needs_one_turn(figures: Figures) -> bool:
    """Whether once is enough, or too much."""
    seconds = figures.get("seconds", 0.0)  # a list, for a series of problems
    slow = isinstance(seconds, float) and seconds > SLOW_SECONDS
    return "cannot" in figures or "compile_seconds" in figures or slow


def summarise(runs: Sequence[Figures], ours: Sequence[Figures]) -> Figures:
    """Medians of a peer's turns, and how many times our time it took, turn by turn."""
    if "cannot" in runs[0]:
        return {"cannot": runs[0]["cannot"]}
    ratios = [run["seconds"] / our["seconds"] for run, our in zip(runs, ours, strict=False)]
    seconds = statistics.median(run["seconds"] for run in runs)
    together = statistics.median(our["seconds"] for our in ours[: len(runs)])
    summary = {
        "seconds": seconds,
        "peak_gigabytes": statistics.median(run["peak_bytes"] for run in runs) / 1e9,
        "ratio_to_sasa": seconds / together,
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "turns": len(runs),
        "calls": sum(run["calls"] for run in runs),
    }
    if "largest_difference" in runs[0]:
        summary["largest_difference"] = max(run["largest_difference"] for run in runs)
    if "compile_seconds" in runs[0]:
        summary["compile_seconds"] = runs[0]["compile_seconds"]
    return summary
