"""Repeated calls of a layer with the same layouts: whatever depends on the layouts alone is computed once.

In a small layer that takes longer than the attention itself. The results are those of the full path,
:func:`sasa.ops.attend.attend`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .autograd import Operator, apply_here, is_observed, is_transformed, needs_gradient
from .implementations import Forward, Projected, choose, is_the_equation, machine
from .memory_format import EmbeddingLayout, is_channels_last_image, layout_of, like_image, strides_of
from .operators import PROJECTED, not_empty, not_none
from .precision import is_active, without_autocast
from .projected import is_large
from .window import Pair, window_of

Call = Callable[..., Tensor]


def prepared(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    options: tuple[Any, ...],
    recompute: bool | None,
) -> Tensor | None:
    """The output, if the call is a plain one that an implementation can prepare; else None. Arguments as for
    ``attend``; ``options`` are those between ``table`` and ``recompute``.
    """
    tensors = x, weight, bias, row, col, table
    if not isinstance(x, Tensor) or is_observed(tensors) or is_active(x.device.type):
        return None
    kinds = tuple([None if y is None else (y.dtype, y.device) for y in tensors])
    layouts = kinds, x.shape, x.stride(), weight.shape, weight.stride()
    embeddings = layout_of(row, options[0]), layout_of(col, options[0]), strides_of(table)
    tracked = needs_gradient(*tensors)
    call = _prepare(*layouts, *embeddings, *options, recompute if tracked else None, tracked, machine())
    return None if call is None else call(*tensors)


def projects_inside(
    x: Tensor, weight: Tensor, num_heads: int, implementation: str | None, recompute: bool | None, tracked: bool
) -> bool:
    """Whether projections and attention are one step, so that queries, keys and values are not kept.

    ``tracked``: whether there may be a backward. The rest is as in :func:`sasa.ops.attend.attend`.
    """
    if torch.compiler.is_compiling() or (tracked and recompute is not None):
        return bool(recompute) if tracked else x.device.type == "cpu"
    kernels = choose(implementation, x, weight.shape[0] // 3 // num_heads).projected
    if kernels is not None and kernels.supports(x, weight, num_heads):
        return not tracked or kernels.preferred(x, weight, num_heads)
    # If nothing is saved, it takes less memory to hold queries, keys and values of only a few images at a time.
    return not tracked and x.device.type == "cpu" and is_large(x, weight)


@functools.lru_cache(maxsize=4096)
def _prepare(
    kinds: tuple[tuple[torch.dtype, torch.device] | None, ...],
    shape: torch.Size,
    strides: tuple[int, ...],
    weight_shape: torch.Size,
    weight_strides: tuple[int, ...],
    row: EmbeddingLayout | None,
    col: EmbeddingLayout | None,
    table: tuple[int, ...] | None,
    num_heads: int,
    kernel_size: Pair,
    stride: Pair,
    dilation: Pair,
    border: str,
    scale: float,
    pool: int,
    implementation: str | None,
    recompute: bool | None,
    tracked: bool,
    machine: tuple[int, ...],
) -> Call | None:
    """The prepared call for these layouts; None if they must be checked, cast or cropped each time."""
    fits = len(shape) == 4 and shape[1] == weight_shape[1] and 0 not in shape
    if kinds[0] is None or len(set(kinds) - {None}) > 1 or not fits or is_the_equation(implementation):
        return None
    dtype, device = kinds[0]
    x, weight = (torch.empty(1, dtype=dtype, device=device).expand(sizes) for sizes in (shape, weight_shape))
    kernels = choose(implementation, x, weight_shape[0] // 3 // num_heads).projected
    inside = projects_inside(x, weight, num_heads, implementation, recompute, tracked)
    if kernels is None or (inside and not kernels.supports(x, weight, num_heads)):
        return None
    checks.scale_of(scale, dtype)
    fitted, stride, dilation, _ = checks.window_sizes(shape[2:], kernel_size, stride, dilation, border)
    if fitted != kernel_size:
        return None
    window = window_of(x, fitted, stride, dilation, border)
    computed = num_heads, window, scale, pool
    if inside:
        present = (half if half is not None and half[1] > 0 else None for half in (row, col))
        layouts = shape, strides, dtype, weight_shape[0], weight_strides, *present, table
        run = kernels.prepare(*layouts, *computed, *machine)
    else:
        run = functools.partial(_run, kernels, computed)

    def forward(x, weight, bias, row, col, table):
        return run(x, weight, bias, not_empty(row), not_empty(col), table)

    if tracked:
        options = num_heads, kernel_size, stride, dilation, border, scale, implementation, pool
        call = functools.partial(apply_here, _operator(kernels, forward, computed, options))
    else:
        call = functools.partial(_without_gradient, forward)
    return call if inside else functools.partial(_projected_first, call)


def _run(kernels: Projected, computed: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    return kernels.forward(*tensors, *computed)


def _without_gradient(forward: Forward, *tensors: Tensor | None) -> Tensor:
    return forward(*tensors)[0]


def _projected_first(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor | None) -> Tensor:
    return call(project(x, weight, bias), None, None, *others)


def _operator(kernels: Projected, forward: Forward, computed: tuple[Any, ...], options: tuple[Any, ...]) -> Operator:
    """The projected operator with its options."""

    def backward(grad, x, weight, bias, row, col, table, lse):
        if is_observed((grad,)) or is_active(grad.device.type):
            return PROJECTED.backward(grad, x, weight, bias, row, col, table, lse, *options)
        grads = kernels.backward(grad, x, weight, bias, not_empty(row), not_empty(col), table, lse, *computed)
        return grads[0], *not_none(x, (weight, bias, row, col, table), grads[1:])

    def equation(*tensors):
        return PROJECTED.equation(*tensors, *options)

    return Operator(forward, backward, equation, None)


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Queries, keys and values of every pixel, (B, 3·N·D, H, W), in the memory format of ``x``."""
    with without_autocast(x):
        if x.device.type != "cpu" and not is_transformed() and is_channels_last_image(x):
            return by_product(x, weight, bias)
        return like_image(F.conv2d(x, weight, bias), x)


def by_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same of ``x`` in channels_last: one product, which adds the bias itself. On a GPU, a convolution adds it in a
    pass of its own over the result.
    """
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
