"""The registered operators: ``torch.ops.sasa.local_attention``, ``projected_attention`` and their backwards.

Schemas and shapes for tracing (fake and meta tensors) are stated here once, FLOPs in ``flops.py``, derivatives in
``autograd.py``, and hold for every implementation. Each forward also returns the log-sum-exp of the logits, from which
its backward recomputes the weights; the output is not saved.

A layer's weight is (3·N·D, C, 1, 1); without it, the input is the projections. ``row`` (N, Dr, kh), or (N·Dr, kh),
belongs to the first Dr channels of each head, ``col`` (N, Dc, kw) to the last Dc; ``table`` is (N, kh, kw). With the
border ``"shift"`` they have 2kh - 1 and 2kw - 1 entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import block_attention as block_attention  # registers its operators, which have formulas in flops.py
from . import equation, flops, projected
from .autograd import TENSORS, Operator, Registered, register
from .eager import sum_dtype
from .implementations import Backward, Forward, Projected, choose
from .memory_format import empty, empty_image, in_format_of
from .pooling import average_pool
from .precision import without_autocast
from .projected import by_head, channels_of, split_heads
from .window import Window, window_of

_SIZES = "int[2] kernel_size, int[2] stride, int[2] dilation, str border, float scale, str? implementation"
_LOCAL = "Tensor query, Tensor key, Tensor value, Tensor? row, Tensor? col, Tensor? table"
_PROJECTED = "Tensor input, Tensor? weight, Tensor? bias, Tensor? row, Tensor? col, Tensor? table"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def _define(name: str, schema: str) -> None:
    torch.library.define(f"sasa::{name}", schema, tags=_TAGS)


def _implements(name: str) -> Callable[[Callable[..., tuple[Tensor, ...]]], Registered]:
    def implement(function: Callable[..., tuple[Tensor, ...]]) -> Registered:
        torch.library.impl(f"sasa::{name}", "default", function)
        return Registered(getattr(torch.ops.sasa, name).default, function)

    return implement


_define("local_attention", f"({_LOCAL}, {_SIZES}) -> (Tensor output, Tensor lse)")
_define(
    "local_attention_backward",
    f"(Tensor grad_output, {_LOCAL}, Tensor lse, {_SIZES}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_define("projected_attention", f"({_PROJECTED}, int num_heads, {_SIZES}, int pool) -> (Tensor output, Tensor lse)")
_define(
    "projected_attention_backward",
    f"(Tensor grad_output, {_PROJECTED}, Tensor lse, int num_heads, {_SIZES}, int pool)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _kernels(name: str | None, images: Tensor, widest: int) -> tuple[Forward, Backward, Projected | None]:
    chosen = choose(name, images, widest)
    forward, backward = chosen.forward, chosen.backward
    if forward is None or backward is None:
        raise ValueError(f"implementation: {name!r} is the equation, which has no operator: call sasa.local_attention")
    return forward, backward, chosen.projected


@_implements("local_attention")
def _local(query, key, value, row, col, table, kernel_size, stride, dilation, border, scale, implementation):
    window = window_of(query, kernel_size, stride, dilation, border)
    run, _, _ = _kernels(implementation, query, max(query.shape[2], value.shape[2]))
    with without_autocast(query):
        output, lse = run(query, key, value, not_empty(row), not_empty(col), table, window, scale)
    return in_format_of(query, output), lse


@_implements("local_attention_backward")
def _local_backward(
    grad_output, query, key, value, row, col, table, lse, kernel_size, stride, dilation, border, scale, implementation
):
    window = window_of(query, kernel_size, stride, dilation, border)
    _, run, _ = _kernels(implementation, query, max(query.shape[2], value.shape[2]))
    with without_autocast(query):
        grads = run(
            grad_output,
            query,
            key,
            value,
            by_head(row, query.shape[1]),
            by_head(col, query.shape[1]),
            table,
            lse,
            window,
            scale,
        )
    dense = [in_format_of(x, grad) for x, grad in zip((query, key, value), grads[:3], strict=True)]
    return (*dense, *not_none(query, (row, col, table), grads[3:]))


@_implements("projected_attention")
def _projected(
    x, weight, bias, row, col, table, num_heads, kernel_size, stride, dilation, border, scale, implementation, pool
):
    window = window_of(x, kernel_size, stride, dilation, border)
    forward, _, ours = _projecting(implementation, x, weight, num_heads)
    row, col = _halves(row, col, num_heads)
    options = num_heads, window, scale, pool
    with without_autocast(x):
        if ours is not None:
            return ours.forward(x, weight, bias, row, col, table, *options)
        output, lse = _empty_results(x, weight, num_heads, window, pool)
        return projected.forward(forward, output, lse, x, weight, bias, row, col, table, *options)


@_implements("projected_attention_backward")
def _projected_backward(
    grad,
    x,
    weight,
    bias,
    row,
    col,
    table,
    lse,
    num_heads,
    kernel_size,
    stride,
    dilation,
    border,
    scale,
    implementation,
    pool,
):
    window = window_of(x, kernel_size, stride, dilation, border)
    _, backward, ours = _projecting(implementation, x, weight, num_heads)
    tensors = grad, x, weight, bias, *_halves(row, col, num_heads), table, lse
    with without_autocast(x):
        if ours is not None:
            grads = ours.backward(*tensors, num_heads, window, scale, pool)
        else:
            grads = projected.backward(backward, *tensors, num_heads, window, scale, pool)
    return (grads[0], *not_none(x, (weight, bias, row, col, table), grads[1:]))


def _projecting(
    name: str | None, x: Tensor, weight: Tensor | None, num_heads: int
) -> tuple[Forward, Backward, Projected | None]:
    """The implementation's kernels, and its projecting ones if they support these arguments."""
    forward, backward, ours = _kernels(name, x, channels_of(x, weight) // num_heads)
    return forward, backward, ours if ours is not None and ours.supports(x, weight, num_heads) else None


def not_empty(embedding: Tensor | None) -> Tensor | None:
    """None for an embedding of no channels, as in the row half of heads of width 1: no special case is needed."""
    return None if embedding is None or embedding.numel() == 0 else embedding


def _halves(row: Tensor | None, col: Tensor | None, num_heads: int) -> tuple[Tensor | None, Tensor | None]:
    """The embeddings as implementations take them."""
    return by_head(not_empty(row), num_heads), by_head(not_empty(col), num_heads)


def not_none(like: Tensor, tensors: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> list[Tensor]:
    """An operator can't return None: the gradient of a missing or empty tensor is an empty tensor."""
    return [
        like.new_empty(0 if x is None else x.shape) if x is None or grad is None else _shaped(grad, x.shape)
        for x, grad in zip(tensors, grads, strict=True)
    ]


def _shaped(grad: Tensor, shape: torch.Size) -> Tensor:
    return grad if grad.shape == shape else grad.view(shape)


def _empty_results(
    x: Tensor, weight: Tensor | None, num_heads: int, window: Window, pool: int
) -> tuple[Tensor, Tensor]:
    size = window.rows.outputs, window.cols.outputs
    pooled = size if pool == 1 else [(length + pool - 1) // pool for length in size]
    lse = x.new_empty((x.shape[0], num_heads, *size), dtype=sum_dtype(x))
    return empty_image(x, channels_of(x, weight), *pooled), lse


@torch.library.register_fake("sasa::local_attention")
def _local_shapes(query, key, value, row, col, table, kernel_size, stride, dilation, border, scale, implementation):
    window = window_of(query, kernel_size, stride, dilation, border)
    size = window.rows.outputs, window.cols.outputs
    lse = query.new_empty((*query.shape[:2], *size), dtype=sum_dtype(query))
    return empty(query, value.shape[2], *size), lse


@torch.library.register_fake("sasa::local_attention_backward")
def _local_backward_shapes(grad_output, query, key, value, row, col, table, lse, *options):
    dense = [empty(x, *x.shape[2:]) for x in (query, key, value)]
    return (*dense, *(query.new_empty(0 if x is None else x.shape) for x in (row, col, table)))


@torch.library.register_fake("sasa::projected_attention")
def _projected_shapes(
    x, weight, bias, row, col, table, num_heads, kernel_size, stride, dilation, border, scale, implementation, pool
):
    return _empty_results(x, weight, num_heads, window_of(x, kernel_size, stride, dilation, border), pool)


@torch.library.register_fake("sasa::projected_attention_backward")
def _projected_backward_shapes(grad_output, x, weight, bias, row, col, table, lse, *options):
    others = [x.new_empty(0 if t is None else t.shape) for t in (weight, bias, row, col, table)]
    return torch.empty_like(x), *others


def _local_equation(
    query, key, value, row, col, table, kernel_size, stride, dilation, border, scale, implementation=None
):
    window = window_of(query, kernel_size, stride, dilation, border)
    return equation.attention(query, key, value, row, col, table, window, scale)


def _projected_equation(
    x,
    weight,
    bias,
    row,
    col,
    table,
    num_heads,
    kernel_size,
    stride,
    dilation,
    border,
    scale,
    implementation=None,
    pool=1,
):
    query, key, value = split_heads(x if weight is None else F.conv2d(x, weight, bias), num_heads)
    row, col = by_head(row, num_heads), by_head(col, num_heads)
    y = _local_equation(query, key, value, row, col, table, kernel_size, stride, dilation, border, scale)
    return average_pool(y.flatten(1, 2), pool)


def fold_heads(function, samples, in_dims, operator, options, tensors):
    """Samples become heads, which are independent of each other: dimension 1 of images, 0 of embeddings and tables.

    The tensors are those of the forward or of the backward; embeddings and table are the three before the last or at
    the end.
    """
    embeddings = (3, 4, 5) if len(tensors) == TENSORS else (4, 5, 6)

    def fold(x: Tensor | None, dim: int | None, heads_at: int) -> Tensor | None:
        if x is None:
            return None
        x = x.expand(samples, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.movedim(0, heads_at).flatten(heads_at, heads_at + 1)

    places = [0 if i in embeddings else 1 for i in range(len(tensors))]
    folded = [fold(*one) for one in zip(tensors, in_dims, places, strict=True)]
    results = function.apply(operator, options, *folded)
    at = [0 if len(results) == TENSORS and i >= 3 else 1 for i in range(len(results))]
    # The gradient of a missing embedding is empty and has no heads.
    unfolded = [
        y.new_empty(samples, 0) if y.dim() == 1 else y.unflatten(dim, (samples, y.shape[dim] // samples))
        for y, dim in zip(results, at, strict=True)
    ]
    return tuple(unfolded), tuple(0 if y.dim() == 2 else dim for y, dim in zip(unfolded, at, strict=True))


LOCAL = Operator(_local, _local_backward, _local_equation, fold_heads)
PROJECTED = Operator(_projected, _projected_backward, _projected_equation, None)

register(_local.operator, LOCAL)
register(_projected.operator, PROJECTED)
flops.register()
