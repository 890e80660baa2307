"""Attention of a layer's projections: queries, keys and values in one tensor, and their gradients in another.

The kernels write into both in place. They don't project: see :func:`sasa.ops.prepared.project`.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ..memory_format import empty_image
from ..pooling import average_pool
from ..projected import LayerGradients, before_pool, by_head, channels_of, split_heads
from ..window import Window


def supports(x: Tensor, weight: Tensor | None, num_heads: int) -> bool:
    """Whether ``x`` is the projections."""
    return weight is None


def preferred(x: Tensor, weight: Tensor, num_heads: int) -> bool:
    """Projecting again in the backward saves memory, not time."""
    return False


def prepare(*layouts: object) -> NoReturn:
    """Never called: only layers that project inside are prepared."""
    raise NotImplementedError


def forward(
    x: Tensor,
    weight: None,
    bias: None,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    num_heads: int,
    window: Window,
    scale: float,
    pool: int,
) -> tuple[Tensor, Tensor]:
    """Output (B, N·D, H', W') and log-sum-exp (B, N, h, w) of ``x``, (B, 3·N·D, H, W)."""
    from . import launch

    height, width = window.rows.outputs, window.cols.outputs
    output = empty_image(x, channels_of(x, None), height, width)
    into = output.unflatten(1, (num_heads, -1))
    embeddings = by_head(row, num_heads), by_head(col, num_heads)
    _, lse = launch.forward(*split_heads(x, num_heads), *embeddings, table, window, scale, into)
    if pool == 1:
        return output, lse
    pooled = average_pool(output, pool)
    return empty_image(x, *pooled.shape[1:]).copy_(pooled), lse


def backward(
    grad_output: Tensor,
    x: Tensor,
    weight: None,
    bias: None,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    lse: Tensor,
    num_heads: int,
    window: Window,
    scale: float,
    pool: int,
) -> LayerGradients:
    """Gradients of ``x``, row, col and table, in the places of a layer's."""
    from . import launch

    grad_x = torch.empty_like(x)  # whose strides the operator promises, of any dense x
    grad = before_pool(grad_output, window, pool).unflatten(1, (num_heads, -1))
    embeddings = by_head(row, num_heads), by_head(col, num_heads)
    into = split_heads(grad_x, num_heads)
    grads = launch.backward(grad, *split_heads(x, num_heads), *embeddings, table, lse, window, scale, into)
    return grad_x, None, None, *grads[3:]
