"""What one call costs where there is next to nothing to compute: the layer beside the convolution it replaces.

Everything runs in this process on one thread, the layers taking turns: medians of many calls on 2 x 2 pixels.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import sasa

from .machine import machine
from .measure import largest_difference

CHANNELS, KERNEL, SIZE = 8, 3, 2
TURNS, CALLS = 15, 300
CONVOLUTION = "convolution 3x3"
MODES = ("forward", "forward and backward")


def layers() -> dict[str, nn.Module]:
    """The convolution, and layers whose heads fill vectors and don't."""
    torch.manual_seed(0)
    found: dict[str, nn.Module] = {CONVOLUTION: nn.Conv2d(CHANNELS, CHANNELS, KERNEL, padding=1)}
    for heads in (8, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that eight heads of eight channels are narrow
            found[f"sasa, {heads} heads"] = sasa.RelativeSelfAttention(CHANNELS, CHANNELS, KERNEL, heads)
    return found


def call(layer: nn.Module, mode: str, x: torch.Tensor) -> Callable[[], None]:
    """One call, without gradients or with those of all parameters."""

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def training() -> None:
        layer(x).sum().backward()

    return forward if mode == "forward" else training


def check(layer: nn.Module, x: torch.Tensor) -> None:
    """Raise unless a layer's output is that of the equation in float64."""
    if not isinstance(layer, sasa.RelativeSelfAttention):
        return
    with torch.no_grad():
        got = layer(x)
        layer.double().implementation = "reference"
        largest_difference((got,), (layer(x.double()),), torch.float32)
    layer.float().implementation = None


def measured(case: str, peer: str) -> dict[str, Any]:
    """Median microseconds of a call of one layer, in this process."""
    return {"microseconds": statistics.median(turn({peer: layers()[peer]}, case, CALLS)[peer])}


def turn(found: dict[str, nn.Module], mode: str, calls: int) -> dict[str, list[float]]:
    """Microseconds of every call of each layer."""
    x = torch.randn(1, CHANNELS, SIZE, SIZE)
    result = {}
    for name, layer in found.items():
        run_once, seconds = call(layer, mode, x), []
        for _ in range(calls):
            start = time.perf_counter()
            run_once()
            seconds.append(time.perf_counter() - start)
        result[name] = [second * 1e6 for second in seconds]
    return result


def run(quick: bool, say: Callable[[str], object]) -> dict[str, Any]:
    """Both modes: medians of the turns, ratios to the convolution of the same turn."""
    here = machine()
    torch.set_num_threads(1)  # PyTorch's convolution would wake others for a few numbers
    try:
        return {"machine": here, "cases": measure_in_turns(quick, say)}
    finally:
        torch.set_num_threads(here["threads"])


def measure_in_turns(quick: bool, say: Callable[[str], object]) -> list[dict[str, Any]]:
    """A case for each mode."""
    found, cases = layers(), []
    for layer in found.values():
        check(layer, torch.randn(1, CHANNELS, SIZE, SIZE))
    for mode in MODES:
        say(f"calls: {mode}")
        turn(found, mode, 100)
        turns = [turn(found, mode, 50 if quick else CALLS) for _ in range(3 if quick else TURNS)]
        medians = [{name: statistics.median(times) for name, times in one.items()} for one in turns]
        peers = {}
        for name in found:
            ratios = [one[name] / one[CONVOLUTION] for one in medians]
            peers[name] = {
                "microseconds": statistics.median(one[name] for one in medians),
                "ratio_to_convolution": statistics.median(ratios),
                "ratio_lowest": min(ratios),
                "ratio_highest": max(ratios),
            }
        cases.append({"case": mode, "peers": peers})
    return cases
