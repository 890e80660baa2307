"""The compiled kernels: calls the C++ library (``csrc/local_attention.h``) with the addresses of CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import struct
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import memory_format, projected
from .cpu_library import (
    capabilities,
    capability,
    capability_index,
    library,
    load,
    set_capability,
    why_missing,
)
from .cpu_structures import UNSUPPORTED, CAxis, CEmbedding, CGradients, CLinear, CProblem, CProjection, CTensor
from .eager import sum_dtype
from .pooling import average_pool
from .window import BORDERS, Axis, Window

__all__ = ["CpuLibraryWarning", "backward", "capabilities", "capability", "forward", "set_capability", "why_missing"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of sasa_dtype
_HUGE_PAGES_FROM = 2**22  # bytes


class CpuLibraryWarning(UserWarning):
    """The compiled CPU kernels are missing: local attention on the CPU runs in plain PyTorch, which is slow."""


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"{reason}. Local attention on the CPU runs in plain PyTorch, slowly.", CpuLibraryWarning, stacklevel=2
    )


def unsupported(images: Tensor, widest: int) -> str | None:
    """Why the kernels can't compute these; None when they can. Heads may have any width."""
    if images.device.type != "cpu":
        return f"it computes on the CPU, the query is on {images.device}"
    if images.dtype not in _DTYPES:
        return f"it computes {', '.join(map(str, _DTYPES))}, the query is {images.dtype}"
    reason = why_missing()
    if reason is not None:
        _warn_once(reason)
    return reason


def forward(
    query: Tensor, key: Tensor, value: Tensor, row: Tensor | None, col: Tensor | None, window: Window, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (B, N, Dv, h, w) in the memory format of ``query``, and log-sum-exp of the logits (B, N, h, w)."""
    height, width = window.rows.outputs, window.cols.outputs
    output = in_huge_pages(memory_format.empty(query, value.shape[2], height, width))
    lse = query.new_empty((*query.shape[:2], height, width), dtype=sum_dtype(query))
    if query.shape[0] > 0:
        layout = _layout(
            query.shape[:3], value.shape[2], query.dtype, window, scale, 1, *machine(),
            (query.stride(), key.stride(), value.stride()), None, half(row, query.shape[1]), half(col, query.shape[1]),
            (output.stride(),),
        )  # fmt: skip
        _call(library().sasa_forward, layout, query, key, value, row, col, lse, output)
    return output, lse


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    lse: Tensor,
    window: Window,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key and value in their memory formats, and of row and col."""
    dense = [in_huge_pages(memory_format.empty(x, *x.shape[2:])) for x in (query, key, value)]
    inputs = (query, key, value), (), row, col, lse.contiguous()
    embeddings = _backward_into(dense, grad_output, *inputs, query.shape[:3], window, scale, 1)
    return dense[0], dense[1], dense[2], *embeddings


def can_project(x: Tensor, weight: Tensor | None, num_heads: int) -> bool:
    """Whether :func:`forward_projected` and its backward compute a layer: to be projected, heads must fill vectors."""
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
        dtype=_DTYPES.index(dtype), capability=capability, heads=heads, channels=channels, value_channels=channels
    )


@functools.lru_cache(maxsize=1024)
def _pooled_inside(window: Window, pool: int) -> int:
    """The part of ``pool`` that the kernels take while the output is in the cache: 2, or 1 for none."""
    problem = CProblem(rows=_axis(window.rows), cols=_axis(window.cols))
    return 2 if pool == 2 and library().sasa_can_pool(problem) else 1


def forward_projected(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row: Tensor | None,
    col: Tensor | None,
    num_heads: int,
    window: Window,
    scale: float,
    pool: int,
) -> tuple[Tensor, Tensor]:
    """Output (B, N·D, H', W') of queries, keys and values that are projected tile by tile and never exist in memory,
    averaged over ``pool`` x ``pool`` windows, and the log-sum-exp (B, N, h, w).
    """
    layer = (x.shape[1], None) if weight is None else (weight.shape[0], weight.stride())
    layouts = x.shape, x.stride(), x.dtype, *layer, half(row, num_heads), half(col, num_heads)
    return prepare_projected(*layouts, num_heads, window, scale, pool, *machine())(x, weight, bias, row, col)


@functools.lru_cache(maxsize=4096)
def prepare_projected(
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    outputs: int,
    weight_strides: tuple[int, ...] | None,
    row: tuple[tuple[int, ...], int] | None,
    col: tuple[tuple[int, ...], int] | None,
    num_heads: int,
    window: Window,
    scale: float,
    pool: int,
    threads: int,
    capability: int,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward of a layer's input of this layout, as a function of input, weight, bias, row and col; all that needs
    only be worked out once.
    """
    batch, width = shape[0], outputs // 3
    channels = width // num_heads
    inside = _pooled_inside(window, pool)
    rows, cols = -(-window.rows.outputs // inside), -(-window.cols.outputs // inside)
    memory = rows * cols * width, rows * cols, cols, 1
    if strides[1] == 1 and strides[3] != 1:  # channels_last
        memory = rows * cols * width, 1, cols * width, width
    layout = _layout(
        (batch, num_heads, channels), channels, dtype, window, scale, inside, threads, capability,
        (_one_head(strides),) if weight_strides else (_heads(strides, channels),) * 3,
        (shape[1], weight_strides) if weight_strides else None, row, col, (_heads(memory, channels),),
    )  # fmt: skip
    step = width * strides[1] * dtype.itemsize  # bytes from the queries to the keys, and on to the values
    output_shape, lse_shape = (batch, width, rows, cols), (batch, num_heads, window.rows.outputs, window.cols.outputs)
    run, sums = library().sasa_forward, torch.promote_types(dtype, torch.float32)

    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, row: Tensor | None, col: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        output = in_huge_pages(x.new_empty_strided(output_shape, memory))
        lse = x.new_empty(lse_shape, dtype=sums)
        if batch > 0:
            bias = None if bias is None else bias.contiguous()
            first = x.data_ptr()
            inputs = (first, first + step, first + 2 * step) if weight is None else (first, weight, bias)
            _call(run, layout, *inputs, row, col, lse, output)
        return average_pool(output, pool // inside), lse

    return forward


def backward_projected(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row: Tensor | None,
    col: Tensor | None,
    lse: Tensor,
    num_heads: int,
    window: Window,
    scale: float,
    pool: int,
) -> projected.LayerGradients:
    """Gradients of input, weight, bias, row and col. Those of the projections exist for a few images at a time."""
    grad_input = in_huge_pages(torch.empty_like(x))
    inside = _pooled_inside(window, pool)
    g = projected.before_pool(grad_output, window, pool // inside).unflatten(1, (num_heads, -1))
    if weight is None:
        dense, qkv = projected.split_heads(grad_input, num_heads), projected.split_heads(x, num_heads)
        inputs = qkv, (), row, col, lse.contiguous()
        embeddings = _backward_into(dense, g, *inputs, dense[0].shape[:3], window, scale, inside)
        return grad_input, None, None, *embeddings
    totals, weight = projected.Totals(weight, bias, row, col), weight.flatten(1)
    bias = None if bias is None else bias.contiguous()
    memory = x.new_empty(0)
    for part in projected.parts(x, weight):
        images, some_lse, some_g, some_grad = (y if part == slice(None) else y[part] for y in (x, lse, g, grad_input))
        pixels = projected.pixels_of(images)
        if memory.shape != (pixels.shape[0], weight.shape[0]):
            memory = in_huge_pages(x.new_empty((pixels.shape[0], weight.shape[0])))
        dense = projected.heads_of(memory, images.shape, num_heads)
        layer = (images,), (weight, bias), row, col, some_lse.contiguous()
        embeddings = _backward_into(dense, some_g, *layer, dense[0].shape[:3], window, scale, inside)
        totals.add(None, None, *embeddings)
        _projection_gradients(memory, pixels, weight, some_grad, totals)
    return grad_input, *totals.rounded()


def _projection_gradients(
    grad: Tensor, pixels: Tensor, weight: Tensor, grad_images: Tensor, totals: projected.Totals
) -> None:
    """Gradients of the projections: writes that of the input, adds to those of weight and bias."""
    images = grad_images.permute(0, 2, 3, 1)
    if images.is_contiguous():
        grad_pixels = images.view(-1, weight.shape[1])
        if linear_gradients(grad, pixels, weight, grad_pixels, totals):
            return
        torch.mm(grad, weight, out=grad_pixels)
    else:
        images.copy_((grad @ weight).view(images.shape))
    totals.add(grad.mT @ pixels, None if totals.likes[1] is None else grad.sum(0))


def linear_gradients(
    grad: Tensor, pixels: Tensor, weight: Tensor, grad_input: Tensor, totals: projected.Totals
) -> bool:
    """Gradients of ``pixels @ weight.T + bias``: writes ``grad_input`` and adds to the totals. False, with nothing
    done, if these matrices are not for this kernel.
    """
    tensors = grad, pixels, weight, grad_input
    if any(x.dtype != torch.float32 or x.device.type != "cpu" or not x.is_contiguous() for x in tensors):
        return False
    grad_weight, grad_bias = totals.zeros(0), totals.zeros(1)
    problem = CLinear(
        threads=torch.get_num_threads(),
        capability=capability_index(),
        pixels=pixels.shape[0],
        outputs=weight.shape[0],
        inputs=weight.shape[1],
        grad=grad.data_ptr(),
        input=pixels.data_ptr(),
        weight=weight.data_ptr(),
        grad_input=grad_input.data_ptr(),
        grad_weight=None if grad_weight is None else grad_weight.data_ptr(),
        grad_bias=None if grad_bias is None else grad_bias.data_ptr(),
    )
    status = library().sasa_linear_gradients(problem)
    if status == UNSUPPORTED:
        return False
    _check(status)
    return True


def in_huge_pages(fresh: Tensor) -> Tensor:
    """``fresh``, a new dense tensor, backed by huge pages where the system has them: half of the time of writing a
    large tensor for the first time is page faults.
    """
    size = fresh.numel() * fresh.element_size()
    if size >= _HUGE_PAGES_FROM:
        found, _ = load()
        if found is not None and fresh.device.type == "cpu":
            found.sasa_use_huge_pages(fresh.data_ptr(), size)
    return fresh


def _backward_into(
    dense: Sequence[Tensor],
    grad_output: Tensor,
    inputs: tuple[Tensor, ...],
    projection: tuple[Tensor, Tensor | None] | tuple[()],
    row: Tensor | None,
    col: Tensor | None,
    lse: Tensor,
    shape: Sequence[int],
    window: Window,
    scale: float,
    pool: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Writes the gradients of query, key and value into ``dense``; returns those of row and col.

    ``inputs`` are query, key and value, or a layer's input, whose weight and bias are its ``projection``. ``shape`` is
    (B, N, D).
    """
    grad_row, grad_col = (None if x is None else x.new_zeros(x.shape) for x in (row, col))
    if (window.rows.outputs, window.cols.outputs) != (window.rows.size, window.cols.size):
        dense[0].zero_()  # pixels that no window is centred on
    if shape[0] > 0:
        x = inputs[0]
        images = (_one_head(x.stride()),) if projection else tuple(x.stride() for x in inputs)
        layer = (x.shape[1], projection[0].stride()) if projection else None
        results = tuple(x.stride() for x in (grad_output, *dense))
        layout = _layout(
            tuple(shape), dense[2].shape[2], x.dtype, window, scale, pool, *machine(), images, layer,
            half(row, shape[1]), half(col, shape[1]), results,
        )  # fmt: skip
        tensors = *inputs, *projection, row, col, lse, grad_output, *dense, grad_row, grad_col
        _call(library().sasa_backward, layout, *tensors)
    return grad_row, grad_col


class _Layout(NamedTuple):
    """The structures of a call in one piece of memory, complete but for the addresses of tensors.

    Attributes:
        memory: sasa_problem, sasa_projection, and sasa_tensor for an output or sasa_gradients.
        addresses: where the addresses of the tensors go.
        results: where the last structure begins.
        projected: whether the problem has a projection.
    """

    memory: bytes
    addresses: tuple[int, ...]
    results: int
    projected: bool


_ADDRESS = struct.Struct("P")
_PROJECTION = ctypes.sizeof(CProblem)  # where it begins
_RESULTS = _PROJECTION + ctypes.sizeof(CProjection)


@functools.lru_cache(maxsize=4096)
def _layout(
    shape: tuple[int, int, int],
    value_channels: int,
    dtype: torch.dtype,
    window: Window,
    scale: float,
    pool: int,
    threads: int,
    capability: int,
    images: tuple[tuple[int, ...], ...],
    layer: tuple[int, tuple[int, ...]] | None,
    row: tuple[tuple[int, ...], int] | None,
    col: tuple[tuple[int, ...], int] | None,
    results: tuple[tuple[int, ...], ...],
) -> _Layout:
    """Kept from call to call: filling the structures takes longer than a small problem.

    Args:
        shape: (B, N, D).
        value_channels: Dv.
        dtype: of all tensors.
        window: geometry.
        scale: factor on the logits.
        pool: 1 or 2.
        threads: at most so many.
        capability: the instruction set.
        images: strides of query, key and value, or of a layer's input, as (B, N, D, H, W).
        layer: a layer's input channels and its weight's strides; or None.
        row: strides of the row embedding and its channels; or None.
        col: likewise of the column embedding.
        results: strides of the output, or of the gradients of output, query, key and value.
    """
    rows, cols = (_embedding(half, first) for half, first in ((row, 0), (col, shape[2] - (col[1] if col else 0))))
    problem = CProblem(
        dtype=_DTYPES.index(dtype), border=BORDERS.index(window.border), threads=threads, capability=capability,
        scale=scale, batch=shape[0], heads=shape[1], channels=shape[2], value_channels=value_channels,
        rows=_axis(window.rows), cols=_axis(window.cols), row=rows, col=cols, pool=pool,
    )  # fmt: skip
    projection = CProjection()
    if layer is None:
        problem.query, problem.key, problem.value = (CTensor(None, strides) for strides in images)
        addresses = [getattr(CProblem, name).offset for name in ("query", "key", "value")]
    else:
        projection = CProjection(CTensor(None, images[0]), layer[0], None, layer[1][:2], None)
        addresses = [_PROJECTION + getattr(CProjection, name).offset for name in ("input", "weight", "bias")]
    addresses += [getattr(CProblem, name).offset for name in ("row", "col", "lse")]
    tensors = [CTensor(None, strides) for strides in results]
    if row is not None:
        rows = _embedding((_contiguous(row[1], window.rows.kernel), row[1]), rows.first)
    if col is not None:
        cols = _embedding((_contiguous(col[1], window.cols.kernel), col[1]), cols.first)
    last = tensors[0] if len(tensors) == 1 else CGradients(*tensors, rows, cols)
    fields = ("output",) if len(tensors) == 1 else ("output", "query", "key", "value", "row", "col")
    addresses += [_RESULTS + (0 if len(tensors) == 1 else getattr(CGradients, name).offset) for name in fields]
    memory = bytes(problem) + bytes(projection) + bytes(last)
    return _Layout(memory, tuple(addresses), _RESULTS, layer is not None)


def _call(function: Callable[[int, int], int], layout: _Layout, *tensors: Tensor | int | None) -> None:
    """Call the library with the structures of ``layout`` and the addresses of the tensors that it lists."""
    memory = bytearray(layout.memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for place, x in zip(layout.addresses, tensors, strict=True):
        if x is not None:
            _ADDRESS.pack_into(memory, place, x if isinstance(x, int) else x.data_ptr())
    if layout.projected:
        _ADDRESS.pack_into(memory, CProblem.projection.offset, start + _PROJECTION)
    status = function(start, start + layout.results)
    if status:
        _check(status)


def machine() -> tuple[int, int]:
    """What a call depends on besides its arguments: number of threads and instruction set."""
    return torch.get_num_threads(), capability_index()


def _one_head(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a layer's input (B, C, H, W) as (B, 1, C, H, W)."""
    batch, *rest = strides
    return batch, 0, *rest


def _heads(strides: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """Strides of (B, N·D, H, W) as (B, N, D, H, W)."""
    batch, channel, *pixel = strides
    return batch, channels * channel, channel, *pixel


def half(embedding: Tensor | None, num_heads: int) -> tuple[tuple[int, ...], int] | None:
    """Strides and channels of an embedding (N, channels, taps) or (N·channels, taps); None for none."""
    if embedding is None:
        return None
    if embedding.dim() == 3:
        return embedding.stride(), embedding.shape[1]
    channels, (channel, tap) = embedding.shape[0] // num_heads, embedding.stride()
    return (channels * channel, channel, tap), channels


def _contiguous(channels: int, taps: int) -> tuple[int, int, int]:
    """Strides of a contiguous (N, channels, taps)."""
    return channels * taps, taps, 1


def _embedding(half: tuple[tuple[int, ...], int] | None, first: int) -> CEmbedding:
    return CEmbedding() if half is None else CEmbedding(None, first, half[1], half[0])


def _axis(axis: Axis) -> CAxis:
    return CAxis(axis.size, axis.outputs, axis.kernel, axis.stride, axis.dilation, axis.before)


def _check(status: int) -> None:
    if status == 1:
        raise MemoryError("local attention on the CPU: not enough memory for the workspace of a thread")
    if status:
        raise RuntimeError(f"local attention on the CPU: the library refused its arguments (status {status})")
