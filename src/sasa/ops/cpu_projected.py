"""The compiled kernels on a layer's input: queries, keys and values are projected tile by tile and never stored in
full; their gradients are held for a few images at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import projected
from .cpu_call import (
    DTYPES,
    axis_of,
    call,
    check,
    in_huge_pages,
    layout,
    machine,
    strides_of_heads,
    strides_of_one_head,
)
from .cpu_library import capability_index, library
from .cpu_structures import UNSUPPORTED, CLinear, CProblem
from .memory_format import EmbeddingLayout, layout_of, strides_of
from .pooling import average_pool
from .window import Window


def can_project(x: Tensor, weight: Tensor | None, num_heads: int) -> bool:
    """Whether :func:`forward` and its backward support a layer: to be projected, heads must fill whole vectors."""
    return weight is None or _can_project(x.dtype, num_heads, weight.shape[0] // 3 // num_heads, capability_index())


def prefers_projected(x: Tensor, weight: Tensor, num_heads: int) -> bool:
    """Whether projecting again in the backward is faster than keeping queries, keys and values."""
    return _prefers_projected(x.dtype, num_heads, weight.shape[0] // 3 // num_heads, capability_index())


@functools.lru_cache(maxsize=1024)
def _can_project(dtype: torch.dtype, heads: int, channels: int, capability: int) -> bool:
    return bool(library().sasa_can_project(_layer(dtype, heads, channels, capability)))


@functools.lru_cache(maxsize=1024)
def _prefers_projected(dtype: torch.dtype, heads: int, channels: int, capability: int) -> bool:
    return bool(library().sasa_prefers_projected(_layer(dtype, heads, channels, capability)))


def _layer(dtype: torch.dtype, heads: int, channels: int, capability: int) -> CProblem:
    return CProblem(
        dtype=DTYPES.index(dtype), capability=capability, heads=heads, channels=channels, value_channels=channels
    )


@functools.lru_cache(maxsize=1024)
def _pooled_inside(window: Window, pool: int) -> int:
    """The part of ``pool`` that the kernels apply while the output is in cache: 2, or 1 for none."""
    problem = CProblem(rows=axis_of(window.rows), cols=axis_of(window.cols))
    return 2 if pool == 2 and library().sasa_can_pool(problem) else 1


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    num_heads: int,
    window: Window,
    scale: float,
    pool: int,
) -> tuple[Tensor, Tensor]:
    """Output (B, N·D, H', W') of queries, keys and values that are projected tile by tile and never stored in full,
    averaged over ``pool`` x ``pool`` windows, and the log-sum-exp (B, N, h, w).
    """
    layer = (x.shape[1], None) if weight is None else (weight.shape[0], weight.stride())
    layouts = x.shape, x.stride(), x.dtype, *layer, layout_of(row, num_heads), layout_of(col, num_heads)
    computed = strides_of(table), num_heads, window, scale, pool
    return prepare(*layouts, *computed, *machine())(x, weight, bias, row, col, table)


@functools.lru_cache(maxsize=4096)
def prepare(
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    outputs: int,
    weight_strides: tuple[int, ...] | None,
    row: EmbeddingLayout | None,
    col: EmbeddingLayout | None,
    table: tuple[int, ...] | None,
    num_heads: int,
    window: Window,
    scale: float,
    pool: int,
    threads: int,
    capability: int,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward for inputs of this layout, as a function of input, weight, bias, row, col and table, with everything
    precomputed that depends on the layout alone.
    """
    batch, width = shape[0], outputs // 3
    channels = width // num_heads
    inside = _pooled_inside(window, pool)
    rows, cols = -(-window.rows.outputs // inside), -(-window.cols.outputs // inside)
    memory = rows * cols * width, rows * cols, cols, 1
    if strides[1] == 1 and strides[3] != 1:  # channels_last
        memory = rows * cols * width, 1, cols * width, width
    kept = layout(
        (batch, num_heads, channels), channels, dtype, window, scale, inside, threads, capability,
        (strides_of_one_head(strides),) if weight_strides else (strides_of_heads(strides, channels),) * 3,
        (shape[1], weight_strides) if weight_strides else None, row, col, table, (strides_of_heads(memory, channels),),
    )  # fmt: skip
    step = width * strides[1] * dtype.itemsize  # bytes from the queries to the keys, and on to the values
    output_shape, lse_shape = (batch, width, rows, cols), (batch, num_heads, window.rows.outputs, window.cols.outputs)
    run, sums = library().sasa_forward, torch.promote_types(dtype, torch.float32)

    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        row: Tensor | None,
        col: Tensor | None,
        table: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        output = in_huge_pages(x.new_empty_strided(output_shape, memory))
        lse = x.new_empty(lse_shape, dtype=sums)
        if batch > 0:
            bias = None if bias is None else bias.contiguous()
            first = x.data_ptr()
            inputs = (first, first + step, first + 2 * step) if weight is None else (first, weight, bias)
            call(run, kept, *inputs, row, col, table, lse, output)
        return average_pool(output, pool // inside), lse

    return forward


def backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    lse: Tensor,
    num_heads: int,
    window: Window,
    scale: float,
    pool: int,
) -> projected.LayerGradients:
    """Gradients of the input and the parameters. Those of the projections are held for a few images at a time."""
    inside = _pooled_inside(window, pool)
    grad_output = projected.before_pool(grad_output, window, pool // inside)
    grad_input, lse = in_huge_pages(torch.empty_like(x)), lse.contiguous()
    options = num_heads, window, scale, inside
    if weight is None:
        embeddings = _attention(
            grad_output, x, None, None, row, col, table, lse, grad_input, grad_input.stride(), *options
        )
        return grad_input, None, None, *embeddings
    bias = None if bias is None else bias.contiguous()
    parts = list(projected.parts(x, weight))
    if len(parts) == 1:
        return grad_input, *_part(grad_output, x, weight, bias, row, col, table, lse, grad_input, None, *options)
    totals, memory = projected.Totals(weight, bias, row, col, table), None
    for part in parts:
        images = x[part]
        pixels = images.numel() // x.shape[1]
        if memory is None or memory.shape[0] != pixels:
            memory = _empty_gradients(x, pixels, weight)
        some = grad_output[part], images, weight, bias, row, col, table, lse[part], grad_input[part], memory
        totals.add(*_part(*some, *options))
    return grad_input, *totals.rounded()


def _empty_gradients(x: Tensor, pixels: int, weight: Tensor) -> Tensor:
    """Where the gradients of queries, keys and values go: a row for each pixel."""
    return in_huge_pages(x.new_empty((pixels, weight.shape[0])))


def _part(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    lse: Tensor,
    grad_input: Tensor,
    memory: Tensor | None,
    num_heads: int,
    window: Window,
    scale: float,
    pool: int,
) -> tuple[Tensor | None, ...]:
    """Writes the gradient of the input; returns those of weight, bias, row, col and table."""
    height, width = x.shape[2:]
    outputs = weight.shape[0]
    if memory is None:
        memory = _empty_gradients(x, x.shape[0] * height * width, weight)
    strides = height * width * outputs, 1, width * outputs, outputs
    tensors = grad_output, x, weight, bias, row, col, table, lse, memory
    embeddings = _attention(*tensors, strides, num_heads, window, scale, pool)
    return *_projections(memory, x, weight, bias is not None, grad_input), *embeddings


def _attention(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    lse: Tensor,
    memory: Tensor,
    strides: tuple[int, ...],
    num_heads: int,
    window: Window,
    scale: float,
    pool: int,
) -> tuple[Tensor | None, ...]:
    """Writes the gradients of queries, keys and values into ``memory``, whose ``strides`` are those of
    (B, 3·N·D, H, W); returns those of row, col and table.
    """
    others = tuple(None if y is None else y.new_zeros(y.shape) for y in (row, col, table))
    outputs = projected.channels_of(x, weight)
    channels, size = outputs // num_heads, x.element_size()
    if window.skips_pixels:
        memory.narrow(1, 0, outputs).zero_()
    if x.shape[0] > 0:
        result = strides_of_heads(strides, channels)
        if weight is None:
            images = (strides_of_heads(x.stride(), channels),) * 3
            first, step = x.data_ptr(), outputs * x.stride(1) * size
            inputs, layer = (first, first + step, first + 2 * step), None
        else:
            images, inputs, layer = (strides_of_one_head(x.stride()),), (x, weight, bias), (x.shape[1], weight.stride())
        kept = layout(
            (x.shape[0], num_heads, channels), channels, x.dtype, window, scale, pool, *machine(), images, layer,
            layout_of(row, num_heads), layout_of(col, num_heads), strides_of(table),
            (strides_of_heads(grad_output.stride(), channels), result, result, result),
        )  # fmt: skip
        first, step = memory.data_ptr(), outputs * strides[1] * size
        grads = first, first + step, first + 2 * step, *others
        call(library().sasa_backward, kept, *inputs, row, col, table, lse, grad_output, *grads)
    return others


def _projections(
    grad: Tensor, x: Tensor, weight: Tensor, biased: bool, grad_input: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the projections: writes that of the input, returns those of weight and bias."""
    images = grad_input.permute(0, 2, 3, 1)
    in_place = images.is_contiguous()
    grad_pixels = images.view(-1, weight.shape[1]) if in_place else grad.new_empty((grad.shape[0], weight.shape[1]))
    grads = linear_gradients(grad, projected.pixels_of(x), weight, biased, grad_pixels)
    if not in_place:
        images.copy_(grad_pixels.view(images.shape))
    return grads


def linear_gradients(
    grad: Tensor, pixels: Tensor, weight: Tensor, biased: bool, grad_input: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``pixels @ weight.T + bias``: writes ``grad_input``, returns those of weight and bias."""
    if grad.dtype == torch.float32 and weight.is_contiguous():
        pixels = pixels.contiguous()
        grad_weight, grad_bias = weight.new_zeros(weight.shape), weight.new_zeros(weight.shape[:1]) if biased else None
        threads, capability = machine()
        problem = CLinear(
            threads, capability, pixels.shape[0], weight.shape[0], weight.shape[1], grad.data_ptr(), pixels.data_ptr(),
            weight.data_ptr(), grad_input.data_ptr(), grad_weight.data_ptr(),
            None if grad_bias is None else grad_bias.data_ptr(),
        )  # fmt: skip
        status = library().sasa_linear_gradients(problem)
        if status != UNSUPPORTED:
            check(status)
            return grad_weight, grad_bias
    matrix = weight.flatten(1)
    torch.mm(grad, matrix, out=grad_input)
    return (grad.mT @ pixels).view(weight.shape), grad.sum(0) if biased else None
