"""A convolution, and attention that starts as that convolution: the same function, by time and memory.

    python -m benchmarks.one kept "64 channels training" sasa      one of its measurements

Training is forward and backward with gradients of the input and of all parameters, as inside a network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sasa

from .layer import CONVOLUTION
from .machine import machine
from .measure import Call, call_of, largest_difference, measure
from .processes import summarise, take_turns

PEERS = ("sasa", CONVOLUTION)
MODES = ("forward", "training")


class Problem(NamedTuple):
    """A 3x3 convolution from as many channels to as many."""

    channels: int
    size: int
    batch: int = 8
    groups: int = 1


PROBLEMS = {
    "16 channels": Problem(16, 32, 32),
    "64 channels": Problem(64, 56),
    "256 channels": Problem(256, 14),
    "512 channels": Problem(512, 7),
    "depthwise": Problem(96, 28, groups=96),
}
QUICK = {"small": Problem(8, 8, 2)}
CASES = {f"{name} {mode}": (problem, mode) for name, problem in (PROBLEMS | QUICK).items() for mode in MODES}


def call(peer: str, problem: Problem, mode: str) -> tuple[Call, list[Tensor]]:
    """The call to measure, and what the convolution gives: its output, and the gradient of the input in training."""
    torch.manual_seed(0)
    conv = nn.Conv2d(problem.channels, problem.channels, 3, padding=1, groups=problem.groups, bias=False)
    layer = sasa.AttentionConv2d(conv) if peer == "sasa" else conv
    x, grad = torch.randn(2, problem.batch, problem.channels, problem.size, problem.size)
    x.requires_grad_(mode == "training")
    gradient = grad if mode == "training" else None
    expected = call_of(lambda: conv(x), mode, [x], gradient)()
    return call_of(lambda: layer(x), mode, [x, *layer.parameters()], gradient), list(expected)


def measured(case: str, peer: str) -> dict[str, Any]:
    """The figures of one of them, in this process, once results are checked on one image."""
    problem, mode = CASES[case]
    tried, expected = call(peer, problem._replace(batch=1), mode)
    difference = largest_difference(tried()[: len(expected)], expected, torch.float32)
    return {"largest_difference": difference} | measure(call(peer, problem, mode)[0])


def run(quick: bool, say: Callable[[str], object]) -> dict[str, Any]:
    """All cases, one after the other; the two take turns."""
    found = []
    for name, (problem, mode) in CASES.items():
        if (problem in QUICK.values()) == quick:
            turns = take_turns("kept", [(name, peer) for peer in PEERS], say, quick)
            peers = {peer: summarise(turns[name, peer], turns[name, "sasa"]) for peer in PEERS}
            found.append({"case": name, "mode": mode, **problem._asdict(), "peers": peers})
    return {"machine": machine(), "cases": found}
