"""Attention in place of a convolution whose output is smaller: it is cropped and pooled to that size."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..ops import checks
from ..ops.pooling import average_pool
from .convolution_like import ConvolutionLike

fx.wrap("average_pool")


class AttentionInPlace(nn.Sequential, ConvolutionLike):  # type: ignore[misc]  # PyTorch annotates _modules in two ways
    """Attention, followed by cropping or pooling to the size of a convolution's output.

    Args:
        parts: ``attention``, and ``crop`` or ``pool`` or both.
        conv: the convolution that it replaces; its size attributes are kept.
    """

    attention: ConvolutionLike

    def __init__(self, parts: OrderedDict[str, nn.Module], conv: nn.Conv2d) -> None:
        super().__init__(parts)
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding = conv.padding

    def _projection(self) -> nn.Module:
        return self.attention._projection()


class Crop(nn.Module):
    """Crops the pixels that a convolution with less padding doesn't compute.

    Args:
        top: rows to cut off above.
        bottom: rows below.
        left: columns on the left.
        right: columns on the right.

    Shape:
        (..., H, W) to (..., H - top - bottom, W - left - right).

    Raises:
        ValueError: no pixels are left of the image.
    """

    def __init__(self, top: int, bottom: int, left: int, right: int) -> None:
        super().__init__()
        self.top, self.bottom, self.left, self.right = top, bottom, left, right

    def forward(self, x: Tensor) -> Tensor:
        """Cut."""
        return crop(x, self.top, self.bottom, self.left, self.right)

    def extra_repr(self) -> str:
        """Arguments as given to the constructor."""
        return f"top={self.top}, bottom={self.bottom}, left={self.left}, right={self.right}"


@fx.wrap
def crop(x: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """The image without its outermost rows and columns."""
    height, width = x.shape[-2:]
    if height <= top + bottom or width <= left + right:
        least = top + bottom + 1, left + right + 1
        raise ValueError(f"x: expected at least {least[0]} x {least[1]} pixels, got {height} x {width}")
    return F.pad(x, (-left, -right, -top, -bottom))  # not a view: reentrant checkpointing forbids in-place changes


class AveragePool(nn.Module):
    """Average pooling whose last windows may be cut off by the border: ``nn.AvgPool2d(kernel_size, ceil_mode=True)``,
    with correct gradients under torch.compile too.

    Args:
        kernel_size: of the windows, and their stride: int or (height, width).
    """

    def __init__(self, kernel_size: int | tuple[int, int]) -> None:
        super().__init__()
        self.kernel_size = checks.pair("kernel_size", kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Pool: (..., H, W) to (..., ceil(H / height), ceil(W / width))."""
        return average_pool(x, self.kernel_size)

    def extra_repr(self) -> str:
        """Arguments as given to the constructor."""
        return f"{self.kernel_size}"
