"""From validated arguments to an implementation: :func:`attend`, which layers call, and its core.

attend ── project ── attend_heads ── autograd.apply ── operator ── implementation
├── both in one step, if the implementation projects: autograd.apply ── operator ── implementation
└── after an earlier plain call of the same layout: what prepared.py cached for it ── implementation
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, equation, log_sum_exp
from .autograd import apply, is_transformed, is_transformed_forward, needs_gradient
from .implementations import is_the_equation
from .memory_format import in_format_of
from .operators import LOCAL, PROJECTED
from .pooling import average_pool
from .precision import autocast, without_autocast
from .prepared import prepared, project, projects_inside
from .projected import by_head, split_heads
from .window import Pair, window_of


def attend(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    num_heads: int,
    kernel_size: Pair,
    stride: Pair = (1, 1),
    dilation: Pair = (1, 1),
    border: str = "zero",
    scale: float = 1.0,
    pool: int = 1,
    implementation: str | None = None,
    recompute: bool | None = None,
) -> Tensor:
    """Local attention of the projections of ``x``: q, k, v = W x + b per pixel.

    Args:
        x: (B, C, H, W) or (C, H, W); without a weight C = 3·N·D, the projections themselves: queries, keys, values.
        weight: (3·N·D, C, 1, 1), or None.
        bias: (3·N·D) or None.
        row: (N, Dr, kh) or (N·Dr, kh), added to the keys' first Dr channels by row of the window; or None.
        col: (N, Dc, kw) or (N·Dc, kw), added to the keys' last Dc channels by column; or None.
        table: (N, kh, kw), added to the logits; or None. With the border ``"shift"`` row, col and table have 2kh - 1
            and 2kw - 1 entries.
        num_heads: N.
        kernel_size: (kh, kw); this and the rest as in :class:`sasa.RelativeSelfAttention`.
        stride: (height, width).
        dilation: (height, width).
        border: ``"zero"``, ``"mask"``, ``"valid"`` or ``"shift"``.
        scale: factor on the logits.
        pool: size and stride of an average pooling of the output; 1 for none.
        implementation: a name or None.
        recompute: whether to save only ``x`` for the backward and project again there; None to do so where it is
            faster.

    Returns:
        (B, N·D, H', W'), or (N·D, H', W'), in the memory format of ``x``.

    Raises:
        ValueError: ``x`` or a parameter is inconsistent with the others, or the implementation doesn't support the
            call.
        TypeError: ``x`` is not a tensor.
    """
    options = num_heads, kernel_size, stride, dilation, border, scale, pool, implementation
    output = None if weight is None else prepared(x, weight, bias, row, col, table, options, recompute)
    if output is not None:
        return output
    checks.layer_input(x, weight.shape[1] if weight is not None else x.shape[-3], weight)
    x, weight, bias, row, col, table = autocast(x, weight, bias, row, col, table)
    checks.parameters_fit(x, weight=weight, bias=bias, row_embedding=row, col_embedding=col, table=table)
    if x.dim() == 3:
        return attend(x.unsqueeze(0), weight, bias, row, col, table, *options, recompute).squeeze(0)
    by_equation = is_the_equation(implementation) or is_transformed() or is_transformed_forward()
    tracked = needs_gradient(x, weight, bias, row, col, table)
    if weight is not None and (
        by_equation  # PyTorch's own convolution, which has every derivative, then projects
        or not projects_inside(x, weight, num_heads, implementation, recompute, tracked)
    ):
        x, weight, bias = project(x, weight, bias), None, None
    if weight is None and by_equation:
        sizes = kernel_size, stride, dilation, border
        row, col = by_head(row, num_heads), by_head(col, num_heads)
        y = attend_heads(*split_heads(x, num_heads), row, col, table, *sizes, scale, implementation)
        # Not a view: under reentrant checkpointing, views can't be changed in place.
        return average_pool(torch.ops.aten._unsafe_view(y, (y.shape[0], y.shape[1] * y.shape[2], *y.shape[3:])), pool)
    checks.scale_of(scale, x.dtype)
    kernel_size, stride, dilation, taps = checks.window_sizes(x.shape[2:], kernel_size, stride, dilation, border)
    options = num_heads, kernel_size, stride, dilation, border, scale, implementation, pool
    return apply(PROJECTED, options, x, weight, bias, *_taps(row, col, table, taps))


def attend_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    kernel_size: Pair,
    stride: Pair,
    dilation: Pair,
    border: str,
    scale: float,
    implementation: str | None,
) -> Tensor:
    """Local attention of queries, keys and values, (B, N, D, H, W) to (B, N, Dv, H', W'); the rest as
    above.
    """
    sizes, row, col, table = _fitted(query, row, col, table, kernel_size, stride, dilation, border, scale)
    if is_the_equation(implementation):
        with without_autocast(query):
            y = equation.attention(query, key, value, row, col, table, window_of(query, *sizes, border), scale)
        return in_format_of(query, y)
    return apply(LOCAL, (*sizes, border, scale, implementation), query, key, value, row, col, table)


def attend_heads_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    kernel_size: Pair,
    stride: Pair,
    dilation: Pair,
    border: str,
    scale: float,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    """The same, plus the log-sum-exp of the logits, (B, N, H', W')."""
    sizes, row, col, table = _fitted(query, row, col, table, kernel_size, stride, dilation, border, scale)
    options = *sizes, border, scale, implementation
    y, lse = log_sum_exp.attention_and_lse(options, query, key, value, row, col, table)
    return in_format_of(query, y), lse


def attend_weights(
    query: Tensor,
    key: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    kernel_size: Pair,
    stride: Pair,
    dilation: Pair,
    border: str,
    scale: float,
) -> Tensor:
    """Attention weights (B, N, kh·kw, H', W') of queries and keys (B, N, D, H, W)."""
    query, key, row, col, table = autocast(query, key, row, col, table)
    row, col = by_head(row, query.shape[1]), by_head(col, query.shape[1])
    checks.scale_of(scale, query.dtype)
    fitted, stride, dilation, _ = checks.window_sizes(query.shape[3:], kernel_size, stride, dilation, border)
    if fitted != kernel_size:  # every tap gets a weight, even one that is always hidden
        checks.most_taps(query.shape[3:], kernel_size, dilation)
    with without_autocast(query):
        window = window_of(query, kernel_size, stride, dilation, border)
        weights = equation.weights(query, key, row, col, table, window, scale)
    # The softmax saves its own result for the backward; the caller gets a copy, which may be changed in place.
    return weights.clone() if needs_gradient(weights) else weights


def _fitted(
    query: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    kernel_size: Pair,
    stride: Pair,
    dilation: Pair,
    border: str,
    scale: float,
) -> tuple[tuple[Pair, Pair, Pair], Tensor | None, Tensor | None, Tensor | None]:
    """Kernel size, stride and dilation cut to the image, and embeddings and table with them; checks the scale."""
    checks.scale_of(scale, query.dtype)
    kernel_size, stride, dilation, taps = checks.window_sizes(query.shape[3:], kernel_size, stride, dilation, border)
    row, col, table = _taps(row, col, table, taps)
    return (kernel_size, stride, dilation), row, col, table


def _taps(
    row: Tensor | None, col: Tensor | None, table: Tensor | None, taps: tuple[slice, slice] | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The entries of embeddings and table that remain in the cropped window: rows and columns; None for all."""
    if taps is None:
        return row, col, table
    rows, cols = taps
    return (
        None if row is None else row[..., rows],
        None if col is None else col[..., cols],
        None if table is None else table[:, rows, cols],
    )
