"""The shapes that are measured, by name."""

from __future__ import annotations

from typing import NamedTuple

TINY = 16  # pixels along a side of the image on which results are checked


class AttentionProblem(NamedTuple):
    """Attention alone: ``num_heads`` heads of ``head_width`` channels on square images."""

    batch: int
    num_heads: int
    head_width: int
    size: int
    kernel_size: int

    @property
    def channels(self) -> int:
        """Channels of each of the queries, keys, values and outputs."""
        return self.num_heads * self.head_width

    @property
    def flops(self) -> int:
        """4·k²·D per query: the products q·k and the weighted sum, 2 FLOPs per multiply-add."""
        queries = self.batch * self.num_heads * self.size**2
        return 4 * self.kernel_size**2 * self.head_width * queries

    def tiny(self) -> AttentionProblem:
        """The same heads and window on one small image."""
        return self._replace(batch=1, size=min(self.size, TINY))


class LayerProblem(NamedTuple):
    """A layer on an input: ``RelativeSelfAttention(in_channels, out_channels, kernel_size, num_heads)``."""

    batch: int
    in_channels: int
    out_channels: int
    size: int
    kernel_size: int
    num_heads: int
    groups: int = 1  # of the convolution, where attention starts as one

    @property
    def qkv_out_bytes(self) -> int:
        """Bytes of queries, keys, values and outputs in float32: what cannot be avoided without fusing the layer."""
        return 4 * 4 * self.batch * self.out_channels * self.size**2

    def tiny(self) -> LayerProblem:
        """The same layer on one small image."""
        return self._replace(batch=1, size=min(self.size, TINY))


ATTENTION = {
    "notebook": AttentionProblem(32, 8, 16, 56, 7),
    "notebook-batch8": AttentionProblem(8, 8, 16, 56, 7),
    "small": AttentionProblem(1, 8, 16, 8, 3),
}

LAYERS = {
    "notebook": LayerProblem(32, 64, 128, 56, 7, 8),
    "notebook-batch8": LayerProblem(8, 64, 128, 56, 7, 8),
    "stage4": LayerProblem(32, 512, 512, 7, 7, 8),
    "small": LayerProblem(1, 32, 32, 8, 3, 8),
}

# The attention of every stage of a ResNet-50, for one image; a layer in each, for 64.
STAGES = {
    "56x56, D 8": AttentionProblem(1, 8, 8, 56, 7),
    "28x28, D 16": AttentionProblem(1, 8, 16, 28, 7),
    "14x14, D 32": AttentionProblem(1, 8, 32, 14, 7),
    "7x7, D 64": AttentionProblem(1, 8, 64, 7, 7),
}
LAYER_STAGES = {
    f"{size}x{size}, {width} channels": LayerProblem(64, width, width, size, 7, 8)
    for width, size in ((64, 56), (128, 28), (256, 14), (512, 7))
}

# Series in which one thing grows: the image, or the window.
SERIES = {
    "pixels": [AttentionProblem(1, 8, 8, size, 7) for size in (28, 56, 112, 224, 448, 1024, 2048)],
    "taps": [AttentionProblem(4, 8, 16, 112, k) for k in (3, 5, 7, 9, 11, 13, 15)],
}
