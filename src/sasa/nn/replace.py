"""The replacement for one convolution: attention with the same output size, or why there is none."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import UninitializedParameter

from .attention_conv import AttentionConv2d
from .in_place_of_convolution import AttentionInPlace, AveragePool, Crop
from .read_convolution import Convolution
from .relative_self_attention import RelativeSelfAttention

STRIDE_MODES = ("pool", "strided")


class ConvolutionAxis(NamedTuple):
    """Rows or columns of a convolution, which turns n pixels into floor((n - lost - 1) / stride) + 1."""

    kernel: int
    stride: int
    dilation: int
    lost: int


def axes(conv: Convolution) -> tuple[ConvolutionAxis, ConvolutionAxis]:
    """The geometry of a convolution."""
    both = []
    for i in (0, 1):
        kernel, dilation = conv.kernel_size[i], conv.dilation[i]
        lost = 0 if conv.pads is None else dilation * (kernel - 1) - sum(conv.pads[2 - 2 * i : 4 - 2 * i])
        both.append(ConvolutionAxis(kernel, conv.stride[i], dilation, lost))
    return both[0], both[1]


def is_spatial(module: nn.Module) -> bool:
    """Whether this is a two-dimensional convolution that sees more than one pixel."""
    return isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1


def nearest_heads(num_heads: int, channels: int) -> int:
    """The divisor of ``channels`` that is nearest to ``num_heads``, as a ratio; the smaller of two equally near.

    Heads are at least two channels wide, one for the rows of the window and one for its columns.
    """
    divisors = [n for n in range(1, channels + 1) if channels % n == 0 and (n == 1 or channels // n > 1)]
    return min(divisors, key=lambda n: (max(n / num_heads, num_heads / n), n))


def why_left_alone(conv: nn.Conv2d, found: Convolution, grouped: bool, stride_mode: str) -> tuple[str, str] | None:
    """Why attention can't replace this convolution, in a word and in a sentence; None if it can."""
    if found.groups > 1 and not grouped:
        kind = "depthwise" if found.groups == conv.in_channels else "grouped"
        why = "depthwise" if kind == "depthwise" else f"in {found.groups} groups"
        return kind, f"{why}, and attention mixes all channels (grouped=True converts it all the same)"
    if found.padding_mode != "zeros":
        return "with padding other than zeros", f"padding_mode={found.padding_mode!r}"
    if any(axis.lost < 0 for axis in axes(found)):
        return "larger than their input", f"padding={conv.padding} makes its output larger than its input"
    if stride_mode == "strided" and any(axis.lost and axis.stride > 1 for axis in axes(found)):
        why = f"padding={conv.padding} doesn't keep the size, which stride_mode='strided' needs"
        return "of less padding than 'strided' needs", why
    return None


def replacement(
    conv: nn.Conv2d,
    found: Convolution,
    kernel_size: tuple[int, int],
    num_heads: int,
    stride_mode: str,
    options: dict[str, Any],
) -> nn.Module:
    """Attention with fresh parameters whose output has the convolution's size, for every input size.

    Attention keeps the size; pixels that the convolution would lose for lack of padding are cropped; the pixels of a
    stride are averaged (``"pool"``), or only every stride-th pixel attends (``"strided"``).

    Args:
        conv: a convolution for which :func:`why_left_alone` returns None.
        found: what it computes.
        kernel_size: window, where the convolution's own kernel is larger than 1.
        num_heads: heads, if they divide the channels.
        stride_mode: ``"pool"`` or ``"strided"``.
        options: further arguments of :class:`RelativeSelfAttention`.
    """
    both = axes(found)
    strides = both[0].stride, both[1].stride
    # Pooling windows are all complete if the convolution drops the remainder; otherwise the last may be cut off.
    whole = all(axis.lost >= axis.stride - 1 for axis in both)
    cut = [axis.lost - (axis.stride - 1 if whole else 0) for axis in both]
    pooled = stride_mode == "pool" and strides != (1, 1)
    by_layer = pooled and strides[0] == strides[1] and not whole and not any(cut)
    arguments = {
        "dilation": tuple(axis.dilation if axis.kernel > 1 else 1 for axis in both),
        "bias": True,  # the queries' bias sets the tap a head starts at, whatever the convolution has
        "device": conv.weight.device,
        "dtype": conv.weight.dtype,
    }
    attention = RelativeSelfAttention(
        conv.in_channels,
        conv.out_channels,
        tuple(size if axis.kernel > 1 else 1 for size, axis in zip(kernel_size, both, strict=True)),
        nearest_heads(num_heads, conv.out_channels),
        1 if pooled else strides,
        pool=strides[0] if by_layer else 1,
        **(arguments | options),
    )
    parts = OrderedDict[str, nn.Module](attention=attention)
    if any(cut):
        # An even kernel reaches one pixel further after its centre than before, and so begins at pixel 0.
        (top, left), (bottom, right) = [c // 2 for c in cut], [c - c // 2 for c in cut]
        parts["crop"] = Crop(top, bottom, left, right)
    if pooled and not by_layer:
        parts["pool"] = nn.AvgPool2d(strides) if whole else AveragePool(strides)
    layer = attention if len(parts) == 1 else AttentionInPlace(parts, conv)
    layer.shows_bias = found.bias is not None  # networks read it to know whether a norm follows
    return layer.train(conv.training)


def describe(layer: nn.Module) -> str:
    """A one-line description of a replacement."""
    if isinstance(layer, AttentionConv2d):
        return f"the same function as attention, {layer.num_heads} heads"
    attention = layer[0] if isinstance(layer, nn.Sequential) else layer
    assert isinstance(attention, RelativeSelfAttention)  # noqa: S101  (replacement() builds nothing else)
    height, width = attention.kernel_size
    text = f"attention {height}x{width}, {attention.num_heads} head{'s' if attention.num_heads > 1 else ''}"
    if attention.stride != (1, 1):
        text += f", stride {attention.stride[0]}x{attention.stride[1]}"
    if attention.dilation != (1, 1):
        text += f", dilation {attention.dilation[0]}x{attention.dilation[1]}"
    if attention.pool > 1:
        text += f", average pool {attention.pool}x{attention.pool}"
    for part in layer if isinstance(layer, nn.Sequential) else ():
        if isinstance(part, Crop):
            text += f", {part.top + part.bottom} rows and {part.left + part.right} columns cut off"
        if isinstance(part, (nn.AvgPool2d, AveragePool)):
            text += ", average pool {}x{}".format(*part.kernel_size)  # type: ignore[misc]
    return text


def holds_a_kernel(module: nn.Module) -> bool:
    """Whether a module that is not an ``nn.Conv2d`` has its own weight that looks like a convolution's."""
    kernels = [p for p in module.parameters(recurse=False) if not isinstance(p, UninitializedParameter)]
    return any(p.dim() == 4 and max(p.shape[2:]) > 1 and min(p.shape[:2]) > 1 for p in kernels)
