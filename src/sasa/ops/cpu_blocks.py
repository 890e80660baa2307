"""Calls of the compiled kernels for attention inside blocks (``csrc/block_attention.h``)."""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu_call import check, machine
from .cpu_library import library, why_missing
from .cpu_structures import CBlockGradients, CBlockResults, CBlocks

MOST_CHANNELS, LARGEST_BLOCK = 4, 8  # SASA_MOST_BLOCK_CHANNELS and SASA_LARGEST_BLOCK of the header


def supports(x: Tensor, block_size: int) -> bool:
    """Whether the library has kernels for such images and blocks."""
    device, dtype, channels = x.device.type, x.dtype, x.shape[1]
    return (device, dtype) == ("cpu", torch.float32) and channels <= MOST_CHANNELS and block_size <= LARGEST_BLOCK


def is_available(x: Tensor) -> bool:
    """Whether there is a library."""
    return why_missing() is None


def forward(x: Tensor, form: Tensor, values: Tensor, sign: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Extreme (B, O, rows, cols), channels_last, mean (O) and variance (O)."""
    outputs = values.shape[1]
    size = x.shape[0], -(-x.shape[2] // block_size), -(-x.shape[3] // block_size), outputs
    extreme, mean, variance = x.new_empty(size), x.new_empty(outputs), x.new_empty(outputs)
    form, values, sign = (tensor.contiguous() for tensor in (form, values, sign))
    results = CBlockResults(extreme.data_ptr(), mean.data_ptr(), variance.data_ptr())
    check(library().sasa_blocks_forward(_problem(x, form, values, sign, None, block_size), results))
    return extreme.permute(0, 3, 1, 2), mean, variance


def backward(
    grad: Tensor, slope: Tensor, offset: Tensor, x: Tensor, form: Tensor, values: Tensor, sign: Tensor, mean: Tensor,
    block_size: int, needs_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, in its memory format, an empty tensor unless ``needs_input``, of form and values."""
    grad_x = torch.empty_like(x) if needs_input else x.new_empty(0)
    grad_form, grad_values = form.new_empty(form.shape), values.new_empty(values.shape)
    grad = grad.permute(0, 2, 3, 1).contiguous()
    form, values, sign, mean, slope, offset = (t.contiguous() for t in (form, values, sign, mean, slope, offset))
    gradients = CBlockGradients(
        grad.data_ptr(), slope.data_ptr(), offset.data_ptr(), grad_x.data_ptr() if needs_input else None,
        grad_x.stride() if needs_input else x.stride(), grad_form.data_ptr(), grad_values.data_ptr(),
    )  # fmt: skip
    check(library().sasa_blocks_backward(_problem(x, form, values, sign, mean, block_size), gradients))
    return grad_x, grad_form, grad_values


def _problem(x: Tensor, form: Tensor, values: Tensor, sign: Tensor, mean: Tensor | None, block_size: int) -> CBlocks:
    return CBlocks(
        *machine(), *x.shape, values.shape[1], form.shape[0], block_size, x.data_ptr(), x.stride(), form.data_ptr(),
        values.data_ptr(), sign.data_ptr(), None if mean is None else mean.data_ptr(),
    )  # fmt: skip
