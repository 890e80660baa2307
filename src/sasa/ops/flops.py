"""FLOPs of the operator, for :mod:`torch.utils.flop_counter`. A multiply-add is 2 FLOPs; the softmax and
additions to logits are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch

from .._when_imported import when_imported
from .window import Axis, window

_COUNTER = "torch.utils.flop_counter"


def _attended(size: Sequence[int], kernel_size, stride, dilation, border: str) -> int:
    """Pairs of a query and a tap of its window. Masked taps outside the image don't count; zeros do."""
    pairs = [(pair[0], pair[-1]) for pair in (kernel_size, stride, dilation)]
    rows, cols, _ = window(size[0], size[1], pairs[0], pairs[1], pairs[2], border)
    if border != "mask":
        return rows.outputs * rows.kernel * cols.outputs * cols.kernel
    return _inside(rows) * _inside(cols)


def _inside(axis: Axis) -> int:
    starts = range(-axis.before, axis.outputs * axis.stride - axis.before, axis.stride)
    taps = range(0, axis.kernel * axis.dilation, axis.dilation)
    return sum(0 <= start + tap < axis.size for start in starts for tap in taps)


def forward_flops(
    query, key, value, row, col, table, kernel_size, stride=(1,), dilation=(1,), border="zero", *args, **kwargs
) -> int:
    """FLOPs of the forward, per query, head and tap: 2·D for q·k, 2·D for q·(row + col), 2·Dv for the weighted sum.

    That is 6·k²·D per query and head for the layer of the paper, and 4·k²·D without embeddings.
    """
    batch, heads, width = query[:3]
    terms = 1 + (row is not None or col is not None)
    pairs = batch * heads * _attended(query[3:], kernel_size, stride, dilation, border)
    return 2 * pairs * (terms * width + value[2])


def backward_flops(
    grad_output, query, key, value, row, col, table, lse, kernel_size, stride, dilation, border, *args, **kwargs
) -> int:
    """FLOPs of the backward: twice the forward's, for two gradients of each product, plus the logits once more."""
    batch, heads, width = query[:3]
    terms = 1 + (row is not None or col is not None)
    pairs = batch * heads * _attended(query[3:], kernel_size, stride, dilation, border)
    return 2 * pairs * (3 * terms * width + 2 * value[2])


def projected_forward_flops(x, weight, bias, row, col, table, num_heads, *options, **kwargs) -> int:
    """FLOPs of the layer's forward: three projections, then as :func:`forward_flops`; pooled or not."""
    query = _query(x, weight, num_heads)
    return _projection(x, weight) + forward_flops(query, query, query, row, col, table, *options)


def projected_backward_flops(grad_output, x, weight, bias, row, col, table, lse, num_heads, *options, **kwargs) -> int:
    """FLOPs of the layer's backward: the projections once more and their two gradients, then the attention's."""
    query = _query(x, weight, num_heads)
    return 3 * _projection(x, weight) + backward_flops(None, query, query, query, row, col, table, lse, *options)


def _query(x: Sequence[int], weight: Sequence[int] | None, num_heads: int) -> tuple[int, ...]:
    """Shape (B, N, D, H, W) of the queries; without a weight ``x`` is the projections."""
    return x[0], num_heads, (x[1] if weight is None else weight[0]) // 3 // num_heads, x[2], x[3]


def _projection(x: Sequence[int], weight: Sequence[int] | None) -> int:
    return 0 if weight is None else 2 * x[0] * x[2] * x[3] * math.prod(weight)


def blocks_forward_flops(x, form, values, sign, block_size: int, *args, **kwargs) -> int:
    """FLOPs of attention inside blocks as computed: x F, values, logits over the image's channels, weighted sum."""
    pixels, pairs = x[0] * x[2] * x[3], _pairs_in_blocks(x, block_size)
    return 2 * pixels * (math.prod(form) + math.prod(values[1:])) + 2 * pairs * (form[0] * x[1] + values[1])


def blocks_backward_flops(
    grad, slope, offset, x, form, values, sign, mean, block_size: int, needs_input: bool, *args, **kwargs
) -> int:
    """FLOPs of its backward: the forward's once more, and two gradients of each product; without that of the image, one
    of each but the weighted sum.
    """
    once = blocks_forward_flops(x, form, values, sign, block_size)
    return 3 * once if needs_input else 2 * once + 2 * _pairs_in_blocks(x, block_size) * values[1]


def _pairs_in_blocks(x: Sequence[int], size: int) -> int:
    rows, cols = (length // size * size**2 + (length % size) ** 2 for length in x[2:])
    return x[0] * rows * cols


def register() -> None:
    """Register the formulas with the counter: now if it is already imported, else when it is.

    Importing it here would also import Triton, which takes five times as long as all of sasa.
    """
    when_imported(_COUNTER, _register_with)


def _register_with(counter: ModuleType) -> None:
    counter.register_flop_formula(torch.ops.sasa.local_attention)(forward_flops)
    counter.register_flop_formula(torch.ops.sasa.local_attention_backward)(backward_flops)
    counter.register_flop_formula(torch.ops.sasa.projected_attention)(projected_forward_flops)
    counter.register_flop_formula(torch.ops.sasa.projected_attention_backward)(projected_backward_flops)
    counter.register_flop_formula(torch.ops.sasa.block_attention)(blocks_forward_flops)
    counter.register_flop_formula(torch.ops.sasa.block_attention_backward)(blocks_backward_flops)
