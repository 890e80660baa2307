"""Calls to measure, and whether their results are correct."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Largest difference from float64 that counts as rounding, relative to the largest number in the result. In bfloat16
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


def largest_difference(results: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> float:
    """Largest difference between results, relative to the largest number of each; raises unless it is rounding."""
    differences = [
        ((result.double() - right.double()).abs().max() / right.double().abs().max()).item()
        for result, right in zip(results, expected, strict=True)
    ]
    if not all(difference <= tolerance for difference in differences):
        raise ArithmeticError(f"the results differ by {differences}, relative to their largest numbers")
    return max(differences)
