"""Throughput of attention alone in every stage of a ResNet-50, beside that of a matrix product.

    python -m benchmarks.one stages "56x56, D 8, batch 8 forward" sasa      one of its measurements

Counted are 4·k²·D FLOPs a query, and 2.5 times that for the backward pass: it recomputes the logits and has four
products of the same size, where the forward pass has two. Softmax and position terms are not counted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from .attention import call, check
from .machine import machine
from .measure import measure
from .problems import STAGES, AttentionProblem
from .processes import Figures, take_turns

BATCHES = (8, 1)
FORWARDS = {"forward": 1.0, "training": 3.5}  # how many times the forward FLOPs a mode has
LEAST_CALLS = 20
SGEMM = "sgemm"
SGEMM_SIZE = 2048


def cases(batches: tuple[int, ...] = BATCHES) -> dict[str, tuple[AttentionProblem, str]]:
    """Problem and mode of every case, by name."""
    return {
        f"{stage}, batch {batch} {mode}": (problem._replace(batch=batch), mode)
        for stage, problem in STAGES.items()
        for batch in batches
        for mode in FORWARDS
    }


def measured(case: str, peer: str) -> dict[str, Any]:
    """The figures of one stage, or of the matrix product, in this process, once results are checked."""
    if case == SGEMM:
        torch.manual_seed(0)
        a, b = torch.randn(2, SGEMM_SIZE, SGEMM_SIZE)
        return measure(lambda: (a @ b,), least_calls=LEAST_CALLS)
    problem, mode = cases()[case]
    difference = check(peer, problem.tiny(), mode)
    return {"largest_difference": difference} | measure(call(peer, problem, mode), least_calls=LEAST_CALLS)


def throughput(flops: float, turns: list[Figures]) -> dict[str, float]:
    """GFLOP/s of the median turn, of the slowest and of the fastest."""
    seconds = [turn["seconds"] for turn in turns]
    middle = statistics.median(seconds)
    return {
        "seconds": middle,
        "gflops": flops / middle / 1e9,
        "gflops_lowest": flops / max(seconds) / 1e9,
        "gflops_highest": flops / min(seconds) / 1e9,
    }


def run(quick: bool, say: Callable[[str], object]) -> dict[str, Any]:
    """All stages; with ``quick`` one image at a time only."""
    chosen = cases((1,) if quick else BATCHES)
    turns = take_turns("stages", [*((name, "sasa") for name in chosen), (SGEMM, SGEMM)], say, quick)
    return {
        "machine": machine(),
        "sgemm": throughput(2 * SGEMM_SIZE**3, turns[SGEMM, SGEMM]),
        "stages": [
            {
                "stage": f"{problem.size}x{problem.size}, D {problem.head_width}",
                "mode": mode,
                **problem._asdict(),
                **throughput(FORWARDS[mode] * problem.flops, turns[name, "sasa"]),
            }
            for name, (problem, mode) in chosen.items()
        ],
    }
