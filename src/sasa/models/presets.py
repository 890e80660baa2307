"""Sizes of the networks, one row each. :func:`sasa.models.create_model` builds them."""

from __future__ import annotations

from typing import NamedTuple


class ResNetSize(NamedTuple):
    """Sizes of a residual network of bottleneck blocks.

    Attributes:
        stem_width: channels after the stem, which also halves the image.
        blocks: bottleneck blocks a stage. Every stage but the first halves the image.
        widths: channels a stage of the spatial layers, inside the bottlenecks.
        expansion: channels between the blocks, as a multiple of the width.
        stem_kernel: window of the stem's attention layer.
        stem_heads: its heads. Grey pixels have little content to attend to: the stem wants many small windows.
        attention_kernel: window of the other attention layers.
        attention_heads: their heads.
        convolution_kernel: kernel of the convolutional twin's layers.
    """

    stem_width: int
    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    expansion: int
    stem_kernel: int
    stem_heads: int
    attention_kernel: int
    attention_heads: int
    convolution_kernel: int

    @property
    def depth(self) -> int:
        """Layers as a ResNet's are counted: one for the stem, three a block, one for the classifier."""
        return 2 + 3 * sum(self.blocks)


# For images of about 28 x 28 pixels.
RESNET14 = ResNetSize(
    stem_width=16,
    blocks=(2, 2),
    widths=(32, 64),
    expansion=2,
    stem_kernel=3,
    stem_heads=8,
    attention_kernel=5,
    attention_heads=4,
    convolution_kernel=3,
)

# name -> (sizes, the spatial layer it is built of). Twins have equal depth and widths.
MODELS: dict[str, tuple[ResNetSize, str]] = {
    "sasa_resnet14": (RESNET14, "attention"),
    "resnet14": (RESNET14, "convolution"),
}
