"""Sizes of the networks, one row each, for :func:`sasa.models.create_model`; timm builds those of the paper too."""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class SmallResNetSize(NamedTuple):
    """Sizes of a residual network of bottleneck blocks for small images.

    Attributes:
        stem_width: channels after the stem, which also halves the image.
        blocks: bottleneck blocks per stage. Every stage but the first halves the image.
        widths: channels of the spatial layers inside the bottlenecks, per stage.
        expansion: channels between the blocks, as a multiple of the width.
        stem_kernel: window of the stem's attention layer.
        stem_heads: its heads. Grey pixels have little content to attend to, so the stem needs many small windows.
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
        """Number of layers, counted as for a ResNet: one for the stem, three per block, one for the classifier."""
        return 2 + 3 * sum(self.blocks)


# For images of about 28 x 28 pixels.
RESNET14 = SmallResNetSize(
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


def scaled(size: SmallResNetSize, width: float = 1.0) -> SmallResNetSize:
    """The same depth with all widths multiplied by ``width``, rounded to whole channels per head, at least two.

    Raises:
        ValueError: ``width`` is not a positive number.
    """
    heads = math.lcm(size.stem_heads, size.attention_heads)
    if not isinstance(width, (int, float)) or not 0 < width < math.inf:
        raise ValueError(f"width: expected a positive factor, got {width!r}")
    stem, *widths = (heads * max(2, round(w * width / heads)) for w in (size.stem_width, *size.widths))
    return size._replace(stem_width=stem, widths=tuple(widths))


# name -> (sizes, the spatial layer it is built from). Twins have equal depth and widths.
SMALL_MODELS: dict[str, tuple[SmallResNetSize, str]] = {
    "sasa_resnet14": (RESNET14, "attention"),
    "resnet14": (RESNET14, "convolution"),
}

# Blocks of the four stages by depth: the paper's section 4.1.
PAPER_DEPTHS = {26: (1, 2, 4, 1), 38: (2, 3, 5, 2), 50: (3, 4, 6, 3)}

# Suffix of the name -> what attends: the columns of the paper's table 1.
PAPER_VARIANTS: dict[str, dict[str, Any]] = {
    "": {"attention_stem": True, "attention_stages": (1, 2, 3, 4)},
    "_convstem": {"attention_stem": False, "attention_stages": (1, 2, 3, 4)},
    "_conv": {"attention_stem": False, "attention_stages": ()},
}

# name -> arguments of SasaResNet.
PAPER_MODELS: dict[str, dict[str, Any]] = {
    f"sasa_resnet{depth}{variant}": {"layers": layers, **arguments}
    for depth, layers in PAPER_DEPTHS.items()
    for variant, arguments in PAPER_VARIANTS.items()
}

MODELS = (*SMALL_MODELS, *PAPER_MODELS)
