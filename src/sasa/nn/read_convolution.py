"""What a convolution computes, subclasses included: one convolution of the padded input, found by running them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from .._compat import TorchDispatchMode, computes_as_conv2d, replaces_forward
from ..ops import checks

Pads = tuple[int, int, int, int]  # left, right, top, bottom, as in torch.nn.functional.pad


@dataclass(frozen=True)
class Convolution:
    """A convolution of the padded input.

    Attributes:
        weight: (out_channels, in_channels / groups, kh, kw), as applied, i.e. after any standardization.
        bias: (out_channels), likewise; None for none.
        stride: of rows and columns.
        dilation: of rows and columns.
        groups: of channels.
        pads: how many pixels are added on each side; None for as many as TensorFlow's "same" padding adds, which
            depends on the size of the image: see :func:`same_pads`.
        padding_mode: what is added: as in ``nn.Conv2d``.
    """

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    pads: Pads | None
    padding_mode: str

    @property
    def kernel_size(self) -> tuple[int, int]:
        """(kh, kw)."""
        return self.weight.shape[2], self.weight.shape[3]


def same_pads(
    size: tuple[int, int], kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> Pads:
    """TensorFlow's "same" padding of an image: an output of ceil(n / stride) pixels, the odd pixel after the image."""
    pads: list[int] = []
    for n, k, s, d in zip(size[::-1], kernel_size[::-1], stride[::-1], dilation[::-1], strict=True):
        total = max(((n + s - 1) // s - 1) * s + d * (k - 1) + 1 - n, 0)
        pads += total // 2, total - total // 2
    return pads[0], pads[1], pads[2], pads[3]


def read(conv: nn.Conv2d) -> Convolution | str:
    """What a convolution computes, or why that is not known.

    For PyTorch's own class its attributes say. Subclasses with their own forward (weight standardization,
    image-dependent padding) are run in evaluation mode on a few small random images: they are understood if they
    compute a single convolution of the padded image, with the same weight for each image, and return its output
    unchanged.
    """
    if is_parametrized(conv):
        return "its parameters are parametrized, as by weight or spectral norm"
    if isinstance(conv.weight, UninitializedParameter):
        return f"{type(conv).__name__} has no shape yet: run the model once before"
    if replaces_forward(conv):
        return "its forward was replaced, which would be lost"
    if computes_as_conv2d(conv):
        stride, dilation = checks.pair("stride", conv.stride), checks.pair("dilation", conv.dilation)
        return Convolution(conv.weight, conv.bias, stride, dilation, conv.groups, _pads(conv), conv.padding_mode)
    return _read_by_running(conv) or f"{type(conv).__name__} computes in a way of its own"


def _pads(conv: nn.Conv2d) -> Pads:
    pads: list[int] = []
    for axis in (1, 0):
        total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
        if isinstance(conv.padding, str):
            before, after = (total // 2, total - total // 2) if conv.padding == "same" else (0, 0)
        else:
            before = after = conv.padding[axis]
        pads += before, after
    return pads[0], pads[1], pads[2], pads[3]


class _Recorder(TorchDispatchMode):
    """Records the arguments that convolutions are called with, and their outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Convolution, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            x, weight, bias, stride, padding, dilation, _, _, groups = args
            pads = padding[1], padding[1], padding[0], padding[0]
            self.calls.append(
                (x, Convolution(weight, bias, tuple(stride), tuple(dilation), groups, pads, "zeros"), output)
            )
        return output


def _read_by_running(conv: nn.Conv2d) -> Convolution | None:
    """What a module with its own forward computes; None if that is not one convolution of the padded input."""
    if conv.weight.is_meta:
        return None  # no values to compare
    least = [d * (k - 1) + 2 + max(conv.stride) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    generator = torch.Generator().manual_seed(0)
    found: list[tuple[tuple[int, int], Convolution]] = []
    try:
        module = copy.deepcopy(conv).eval()
        for more in range(max(4, *conv.stride)):
            size = least[0] + more, least[1] + 2 * more + 1
            x = torch.randn(1, conv.in_channels, *size, generator=generator).to(conv.weight)
            with torch.no_grad(), _Recorder() as recorder:
                output = module(x)
            (padded, call, result), *others = recorder.calls
            pads = _pads_between(x, padded, conv)
            if others or pads is None or not torch.equal(output, result):
                return None
            if any(pads):
                if any(call.pads or ()) and conv.padding_mode != "zeros":
                    return None  # padded twice, in two ways
                total = tuple(a + b for a, b in zip(pads, call.pads or pads, strict=True))
                call = replace(call, pads=total, padding_mode=conv.padding_mode)
            found.append((size, call))
    except Exception:  # third-party modules may raise anything: not understood
        return None
    first = found[0][1]
    if (first.kernel_size, first.stride, first.dilation) != (conv.kernel_size, conv.stride, conv.dilation):
        return None  # code around it may read these
    if not all(_alike(first, call) for _, call in found):
        return None
    if all(call.pads == first.pads for _, call in found):
        return first
    if all(call.pads == same_pads(size, call.kernel_size, call.stride, call.dilation) for size, call in found):
        return replace(first, pads=None)
    return None


def _alike(a: Convolution, b: Convolution) -> bool:
    """Whether two convolutions differ only in their padding."""
    biases = [torch.empty(0) if c.bias is None else c.bias for c in (a, b)]
    numbers = [(c.stride, c.dilation, c.groups, c.padding_mode) for c in (a, b)]
    return torch.equal(a.weight, b.weight) and torch.equal(*biases) and numbers[0] == numbers[1]


def _pads_between(x: Tensor, padded: Tensor, conv: nn.Conv2d) -> Pads | None:
    """The padding that turns ``x`` into ``padded``; None if none does."""
    height, width = (p - n for p, n in zip(padded.shape[-2:], x.shape[-2:], strict=True))
    if padded.dim() != 4 or min(height, width) < 0:
        return None
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    for top in range(height + 1):
        for left in range(width + 1):
            pads = left, width - left, top, height - top
            if torch.equal(F.pad(x, pads, mode=mode), padded):
                return pads
    return None
