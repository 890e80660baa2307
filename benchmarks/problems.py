"""The shapes that are measured, by name."""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """A layer on an input: ``RelativeSelfAttention(in_channels, out_channels, kernel_size, num_heads)``."""

    batch: int
    in_channels: int
    out_channels: int
    size: int
    kernel_size: int
    num_heads: int


PROBLEMS = {
    "notebook": Problem(32, 64, 128, 56, 7, 8),
    "notebook-batch8": Problem(8, 64, 128, 56, 7, 8),
    "stage4": Problem(32, 512, 512, 7, 7, 8),
}
