"""Calls of the kernels for attention inside blocks, the attention stem's: see :mod:`sasa.ops.block_attention`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import unsupported

DEVICES, DTYPES = ("cuda", "xpu"), (torch.float16, torch.bfloat16, torch.float32)
MOST_CHANNELS, LARGEST_BLOCK = 4, 4
THREADS = 32  # of a program: one warp, so that its sums need no barrier
VALUES, GRADIENTS = 128, 32  # at most this many values of a block are in a thread's registers, forward and backward
WIDEST = 8  # channels of a slice of a head
SHARE_BYTES = 2**28  # most memory for the slices' shares of the image's gradient
PROGRAMS = 1024  # that share the blocks of a slice: a few for each of a GPU's schedulers


class Division(NamedTuple):
    """What a kernel is compiled for, and how the work is divided.

    Attributes:
        S: pixels along a block.
        C: channels of the image.
        D: channels of a slice of a head, which a program computes.
        HEAD: channels of a head.
        BLOCKS: that a program computes at a time.
        CUT: whether the image's edge cuts blocks off.
    """

    S: int
    C: int
    D: int
    HEAD: int
    BLOCKS: int
    CUT: bool


def supports(x: Tensor, block_size: int) -> bool:
    """Whether there are kernels for such images and blocks."""
    device, channels = x.device.type, x.shape[1]
    return device in DEVICES and x.dtype in DTYPES and channels <= MOST_CHANNELS and block_size <= LARGEST_BLOCK


def is_available(x: Tensor) -> bool:
    """Whether they run on this machine, and count that many pixels."""
    return unsupported(x, 1) is None and x.shape[1] * x.shape[2] * x.shape[3] < 2**31


def forward(x: Tensor, form: Tensor, values: Tensor, sign: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Extreme (B, O, rows, cols), channels_last, in the image's dtype; mean (O) and variance (O)."""
    from . import launch
    from .kernels import blocks as kernels

    division, sizes, parts = _divide(x, form, values, block_size, VALUES)
    rows, columns, outputs = sizes[2], sizes[3], values.shape[1]
    extreme = x.new_empty((x.shape[0], rows, columns, outputs))
    moments = values.new_empty((parts, outputs, 2))
    form, values, sign = (tensor.contiguous() for tensor in (form, values, sign))
    # The outputs are averages of V_j x_j. A copy, because PyTorch's order of summation depends on the strides.
    pivot = torch.mv(values.mean(0), x[0].contiguous().mean((1, 2), dtype=torch.float32))
    arguments = [x, *x.stride(), form, values, sign, pivot, extreme, moments, *sizes, outputs]
    with launch.on(x.device):
        options = division._asdict() | launch.OPTIONS | {"num_warps": 1}
        launch.start(kernels.forward, (parts, outputs // division.D), arguments, options)
    count = x.numel() // x.shape[1]
    double = torch.float32 if x.device.type == "xpu" else torch.float64  # which some of Intel's GPUs lack
    away, squares = moments.sum(0, dtype=double).div_(count).unbind(1)
    variance = (squares - away.square()).clamp_(min=0)
    return extreme.permute(0, 3, 1, 2), (pivot + away).to(values.dtype), variance.to(values.dtype)


def backward(
    grad: Tensor, slope: Tensor, offset: Tensor, x: Tensor, form: Tensor, values: Tensor, sign: Tensor, mean: Tensor,
    block_size: int, needs_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, in its memory format, an empty tensor unless ``needs_input``, of form and values."""
    rest = form, values, sign, mean, block_size
    if not needs_input:
        grad_form, grad_values = _gradients(grad, slope, offset, x, *rest, x.new_empty(0, dtype=torch.float32))
        return x.new_empty(0), grad_form, grad_values
    # A few images at a time, so that the memory for the shares doesn't grow with the batch.
    slices = values.shape[1] // _slice(values.shape[1] // len(form), block_size, GRADIENTS)
    images = min(len(x), max(1, SHARE_BYTES // (4 * slices * x[0].numel())))
    shares = x.new_empty((slices * images, *x.shape[1:]), dtype=torch.float32)
    grad_x, grad_form, grad_values = torch.empty_like(x), torch.zeros_like(form), torch.zeros_like(values)
    for start in range(0, len(x), images):
        end = min(len(x), start + images)
        own = shares[: slices * (end - start)].view(slices, end - start, *x.shape[1:])
        of_form, of_values = _gradients(grad[start:end], slope, offset, x[start:end], *rest, own)
        grad_form += of_form
        grad_values += of_values
        grad_x[start:end] = own.sum(0)
    return grad_x, grad_form, grad_values


def _gradients(
    grad: Tensor, slope: Tensor, offset: Tensor, x: Tensor, form: Tensor, values: Tensor, sign: Tensor, mean: Tensor,
    block_size: int, shares: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of form and values; writes the slices' shares of that of the input, unless there is no room."""
    from . import launch
    from .kernels import blocks as kernels

    division, sizes, parts = _divide(x, form, values, block_size, GRADIENTS)
    outputs, slices = values.shape[1], values.shape[1] // division.D
    grad = grad.permute(0, 2, 3, 1).contiguous()
    form, values, sign, mean, slope, offset = (t.contiguous() for t in (form, values, sign, mean, slope, offset))
    of_form = form.new_empty((parts, slices, *form.shape[1:]))
    of_values = values.new_empty((parts, slices, values.shape[0], division.D, values.shape[2]))
    arguments = [x, *x.stride(), form, values, sign, grad, slope, offset, mean, of_form, of_values, shares, *sizes]
    with launch.on(x.device):
        options = division._asdict() | launch.OPTIONS | {"NEEDS_X": shares.numel() > 0, "num_warps": 1}
        launch.start(kernels.backward, (parts, slices), [*arguments, outputs], options)
    grad_form = of_form.sum(0).unflatten(0, (len(form), -1)).sum(1)
    return grad_form, of_values.sum(0).transpose(0, 1).reshape(values.shape).contiguous()


def _slice(head: int, size: int, most: int) -> int:
    """Channels of a slice: the most that divide a head's and fit into registers."""
    return next(d for d in range(min(head, WIDEST), 0, -1) if head % d == 0 and (size * size * d <= most or d == 1))


def _divide(x: Tensor, form: Tensor, values: Tensor, size: int, most: int) -> tuple[Division, tuple[int, ...], int]:
    """Also the sizes that the kernels take, and how many programs share the blocks of a slice."""
    batch, channels, height, width = x.shape
    head = values.shape[1] // len(form)
    division = Division(size, channels, _slice(head, size, most), head, THREADS, bool(height % size or width % size))
    rows, columns = -(-height // size), -(-width // size)
    blocks = batch * rows * columns
    of_all = -(-blocks // THREADS)
    groups = -(-of_all // PROGRAMS)
    return division, (height, width, rows, columns, blocks, groups), -(-of_all // groups)
