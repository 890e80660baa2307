"""Attention inside the blocks of an image, and what a following batch norm and max pool need: one operator.

    logit_pj = x_p^T F x_j          for the pixels p and j of a block; F = W_Q^T W_K, one matrix a head
    y_p      = sum over j of softmax_j(logit_pj) · V_j x_j          V_j: one matrix for each position in a block

Returned are the extreme of y in each block, and its mean and variance over all pixels: y itself is never stored in
memory. An image has few channels C, so C numbers stand in for the D channels of a head's queries and keys. There are
kernels for float32 on the CPU and for GPUs; :func:`equation` handles everything else, and all derivatives beyond the
first. Images may be in half precision with the rest in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._compat import below_autograd
from . import cpu_blocks
from .autograd import Registered, is_observed, is_transformed, is_transformed_forward, needs_gradient
from .derivatives import gradients
from .precision import without_autocast
from .triton import blocks as triton_blocks

_KERNELS: dict[str, Any] = {"cpu": cpu_blocks, "triton": triton_blocks}


class Extremes(NamedTuple):
    """Of the outputs y.

    Attributes:
        extreme: (B, O, ceil(H / size), ceil(W / size)), channels_last: the largest y of each block where the sign is
            positive, the smallest where it is negative, that of the first pixel where it is 0; in the dtype of the
            image, the rest in that of the values.
        mean: (O), over all pixels.
        variance: (O), divided by the number of pixels.
    """

    extreme: Tensor
    mean: Tensor
    variance: Tensor


def is_fast(x: Tensor, block_size: int, implementation: str | None) -> bool:
    """Whether the compiled kernels support the call, and nothing active needs more than a first derivative."""
    return (
        _has_kernels(x, block_size, implementation)
        and not (is_transformed() or is_transformed_forward())
        and not torch.onnx.is_in_onnx_export()  # ONNX has operations for local attention, and blocks are a special case
    )


def _has_kernels(x: Tensor, block_size: int, implementation: str | None) -> bool:
    for name, kernels in _KERNELS.items():
        if implementation in (None, name) and kernels.supports(x, block_size):
            return torch.compiler.is_compiling() or kernels.is_available(x)  # compiled code leaves that to the operator
    return False


def block_attention(x: Tensor, form: Tensor, values: Tensor, sign: Tensor, block_size: int) -> Extremes:
    """Extreme, mean and variance of attention inside blocks; differentiable.

    Args:
        x: (B, C, H, W), in the dtype of the others or half precision.
        form: F, (N, C, C).
        values: V, (block_size², O, C).
        sign: (O), of 1, -1 and 0: which extreme.
        block_size: pixels along a block; those at the lower and right edge may be smaller.
    """
    tensors = x, form, values, sign
    if needs_gradient(*tensors) and not is_observed(tensors):
        return Extremes(*_BlockAttention.apply(*tensors, block_size))
    return Extremes(*FORWARD(*tensors, block_size))


def equation(x: Tensor, form: Tensor, values: Tensor, sign: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain ATen operations, with blocks padded with hidden pixels."""
    with without_autocast(x):
        return _equation(x, form, values, sign, block_size)


def _equation(x: Tensor, form: Tensor, values: Tensor, sign: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    heads, dtype, precise = form.shape[0], x.dtype, torch.promote_types(x.dtype, form.dtype)
    x, form, values, sign = (y.to(precise) for y in (x, form, values, sign))
    below, right = -x.shape[2] % block_size, -x.shape[3] % block_size
    inside = F.pad(torch.ones_like(x[:1, :1], requires_grad=False), (0, right, 0, below)) > 0
    pixels, inside = _blocks(F.pad(x, (0, right, 0, below)), block_size), _blocks(inside, block_size)
    logits = torch.einsum("brsic,ncd,brsjd->brsnij", pixels, form, pixels)
    weights = logits.masked_fill(~inside.mT.unsqueeze(3), float("-inf")).softmax(-1)
    v = torch.einsum("brsjc,joc->brsjo", pixels, values).unflatten(-1, (heads, -1))
    y = torch.einsum("brsnij,brsjnd->brsind", weights, v).flatten(-2)
    first = torch.arange(y.shape[3], device=y.device)[:, None] == 0
    order = torch.where(sign == 0, first.to(y.dtype), y * sign).masked_fill(~inside, float("-inf"))
    extreme = y.gather(3, order.argmax(3, keepdim=True)).squeeze(3)
    count = x.numel() // x.shape[1]
    mean = (y * inside).sum((0, 1, 2, 3)) / count
    variance = ((y - mean).square() * inside).sum((0, 1, 2, 3)) / count
    return extreme.permute(0, 3, 1, 2).to(dtype), mean, variance


def _blocks(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) as (B, rows, cols, size², C) of blocks."""
    return x.unflatten(2, (-1, size)).unflatten(4, (-1, size)).permute(0, 2, 4, 3, 5, 1).flatten(3, 4)


# --- the operators ---

_TENSORS = "Tensor input, Tensor form, Tensor values, Tensor sign"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
torch.library.define(
    "sasa::block_attention",
    f"({_TENSORS}, int block_size) -> (Tensor extreme, Tensor mean, Tensor variance)",
    tags=_TAGS,
)
torch.library.define(
    "sasa::block_attention_backward",
    f"(Tensor grad, Tensor slope, Tensor offset, {_TENSORS}, Tensor mean, int block_size, bool needs_input)"
    " -> (Tensor input, Tensor form, Tensor values)",
    tags=_TAGS,
)


def _kernels(x: Tensor, rest: tuple[Tensor, ...], block_size: int) -> Any:
    """The module with kernels for the call; None for the equation."""
    if x.numel() and all(y.dtype == torch.float32 for y in rest):
        for kernels in _KERNELS.values():
            if kernels.supports(x, block_size) and kernels.is_available(x):
                return kernels
    return None


def _forward(x: Tensor, form: Tensor, values: Tensor, sign: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    if kernels := _kernels(x, (form, values, sign), block_size):
        return kernels.forward(x, form, values, sign, block_size)
    extreme, mean, variance = equation(x, form, values, sign, block_size)
    return extreme.contiguous(memory_format=torch.channels_last), mean, variance


def _backward(
    grad: Tensor, slope: Tensor, offset: Tensor, x: Tensor, form: Tensor, values: Tensor, sign: Tensor, mean: Tensor,
    block_size: int, needs_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, an empty tensor unless ``needs_input``, of form and values.

    That of y is ``grad`` at each block's extreme, plus offset + slope · (y - mean) at every pixel.
    """
    if kernels := _kernels(x, (form, values, sign, mean, slope, offset), block_size):
        return kernels.backward(grad, slope, offset, x, form, values, sign, mean, block_size, needs_input)
    count = x.numel() // x.shape[1]
    grads = _by_equation((grad, offset * count, slope * (count / 2)), x, form, values, sign, block_size)
    grad_x = torch.empty_like(x).copy_(grads[0]) if needs_input else x.new_empty(0)
    return grad_x, grads[1].contiguous(), grads[2].contiguous()


def _by_equation(
    grads: tuple[Tensor, Tensor, Tensor], x: Tensor, form: Tensor, values: Tensor, sign: Tensor, block_size: int
) -> tuple[Any, ...]:
    def function(x: Tensor, form: Tensor, values: Tensor) -> Any:
        return equation(x, form, values, sign, block_size)

    with without_autocast(x):
        return gradients(function, (), grads, (x, form, values))  # pyright: ignore[reportArgumentType]


torch.library.impl("sasa::block_attention", "default", _forward)
torch.library.impl("sasa::block_attention_backward", "default", _backward)
FORWARD = Registered(torch.ops.sasa.block_attention.default, _forward)
BACKWARD = Registered(torch.ops.sasa.block_attention_backward.default, _backward)


@torch.library.register_fake("sasa::block_attention")
def _shapes(x, form, values, sign, block_size):
    rows, cols = ((length + block_size - 1) // block_size for length in x.shape[2:])
    extreme = x.new_empty((x.shape[0], rows, cols, values.shape[1])).permute(0, 3, 1, 2)
    return extreme, values.new_empty(values.shape[1]), values.new_empty(values.shape[1])


@torch.library.register_fake("sasa::block_attention_backward")
def _backward_shapes(grad, slope, offset, x, form, values, sign, mean, block_size, needs_input):
    return (
        torch.empty_like(x) if needs_input else x.new_empty(0),
        form.new_empty(form.shape),
        values.new_empty(values.shape),
    )


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, form: Tensor, values: Tensor, sign: Tensor, block_size: int):
        tensors = x, form, values, sign
        with below_autograd():
            results = FORWARD(*tensors, block_size)
        ctx.save_for_backward(*tensors, results[1])
        ctx.block_size = block_size
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        x, form, values, sign, mean = ctx.saved_tensors
        if torch.is_grad_enabled() or is_transformed() or is_transformed_forward():
            return *_by_equation(grads, x, form, values, sign, ctx.block_size), None, None
        count = max(1, x.numel() // x.shape[1])
        given = grads[0], grads[2] * (2 / count), grads[1] / count, x, form, values, sign, mean
        grad_x, *rest = BACKWARD(*given, ctx.block_size, ctx.needs_input_grad[0])
        return grad_x if ctx.needs_input_grad[0] else None, *rest, None, None


def _differentiable(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    transformed = is_transformed() or is_transformed_forward()
    if transformed:  # PyTorch applies no Function while a transform dispatches an operator
        return equation(*arguments)
    if needs_gradient(*arguments[:4]):
        return _BlockAttention.apply(*arguments)
    with below_autograd():
        return torch.ops.sasa.block_attention(*arguments)


torch.library.impl("sasa::block_attention", "Autograd", _differentiable)
