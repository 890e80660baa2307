"""The compiled kernels: calls the C++ library (``csrc/local_attention.h``) with the addresses of CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Sequence

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
        problem = _local_problem(query, key, value, row, col, lse, window, scale)
        _check(library().sasa_forward(problem, _tensor(output)))
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
    lse = lse.contiguous()
    problem = _local_problem(query, key, value, row, col, lse, window, scale)
    return dense[0], dense[1], dense[2], *_backward_into(dense, problem, grad_output, row, col, window)


def can_project(x: Tensor, weight: Tensor, num_heads: int) -> bool:
    """Whether :func:`forward_projected` and its backward compute a layer: its heads must fill vectors."""
    return _can_project(x.dtype, num_heads, weight.shape[0] // 3 // num_heads, capability_index())


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
    weight: Tensor,
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
    channels = weight.shape[0] // 3 // num_heads
    height, width = window.rows.outputs, window.cols.outputs
    inside = _pooled_inside(window, pool)
    output = memory_format.empty_image(x, num_heads * channels, -(-height // inside), -(-width // inside))
    in_huge_pages(output)
    lse = x.new_empty((x.shape[0], num_heads, height, width), dtype=sum_dtype(x))
    if x.shape[0] > 0:
        problem = _problem((*lse.shape[:2], channels), channels, x.dtype, row, col, lse, window, scale, inside)
        keep = _set_projection(problem, x, weight, bias)
        _check(library().sasa_forward(problem, _heads(output, channels)))
        del keep
    return average_pool(output, pool // inside), lse


def backward_projected(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row: Tensor | None,
    col: Tensor | None,
    lse: Tensor,
    num_heads: int,
    window: Window,
    scale: float,
    pool: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight, bias, row and col. Those of the projections exist for a few images at a time."""
    weight = weight.flatten(1)
    totals = projected.Totals(weight, bias, row, col)
    grad_input = in_huge_pages(torch.empty_like(x))
    inside = _pooled_inside(window, pool)
    g = projected.before_pool(grad_output, window, pool // inside).unflatten(1, (num_heads, -1))
    memory = x.new_empty(0)
    for part in projected.parts(x, weight):
        images, some_lse = x[part], lse[part].contiguous()
        pixels = projected.pixels_of(images)
        if memory.shape != (pixels.shape[0], weight.shape[0]):
            memory = in_huge_pages(x.new_empty((pixels.shape[0], weight.shape[0])))
        dense = projected.heads_of(memory, images.shape, num_heads)
        shape = dense[0].shape[:3]
        problem = _problem(shape, shape[2], x.dtype, row, col, some_lse, window, scale, inside)
        keep = _set_projection(problem, images, weight, bias)
        totals.add_embeddings(_backward_into(dense, problem, g[part], row, col, window))
        del keep
        _projection_gradients(memory, pixels, weight, grad_input[part], totals)
    return grad_input, *totals.in_dtype_of(weight)


def _projection_gradients(
    grad: Tensor, pixels: Tensor, weight: Tensor, grad_images: Tensor, totals: projected.Totals
) -> None:
    """Gradients of the projections: writes that of the input, adds to those of weight and bias."""
    images = grad_images.permute(0, 2, 3, 1)
    if images.is_contiguous():
        grad_pixels = images.view(-1, weight.shape[1])
        if linear_gradients(grad, pixels, weight, grad_pixels, totals.weight, totals.bias):
            return
        torch.mm(grad, weight, out=grad_pixels)
    else:
        images.copy_((grad @ weight).view(images.shape))
    totals.add_projection(grad, pixels)


def linear_gradients(
    grad: Tensor, pixels: Tensor, weight: Tensor, grad_input: Tensor, grad_weight: Tensor, grad_bias: Tensor | None
) -> bool:
    """Gradients of ``pixels @ weight.T + bias``: writes ``grad_input`` and adds to the other two. False, with nothing
    done, if these matrices are not for this kernel.
    """
    tensors = [grad, pixels, weight, grad_input, grad_weight] + ([] if grad_bias is None else [grad_bias])
    if any(x.dtype != torch.float32 or x.device.type != "cpu" or not x.is_contiguous() for x in tensors):
        return False
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
        grad_weight=grad_weight.data_ptr(),
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
    problem: CProblem,
    grad_output: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    window: Window,
) -> tuple[Tensor | None, Tensor | None]:
    """Writes the gradients of query, key and value into ``dense``; returns those of row and col."""
    grad_row, grad_col = (None if x is None else x.new_zeros(x.shape) for x in (row, col))
    if (window.rows.outputs, window.cols.outputs) != (window.rows.size, window.cols.size):
        dense[0].zero_()  # pixels that no window is centred on
    if problem.batch > 0:
        channels = problem.channels
        embeddings = _embedding(grad_row, 0), _embedding(grad_col, channels)
        gradients = CGradients(_tensor(grad_output), *map(_tensor, dense), *embeddings)
        _check(library().sasa_backward(problem, gradients))
    return grad_row, grad_col


def _local_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    lse: Tensor,
    window: Window,
    scale: float,
) -> CProblem:
    problem = _problem(query.shape[:3], value.shape[2], query.dtype, row, col, lse, window, scale, 1)
    problem.query, problem.key, problem.value = _tensor(query), _tensor(key), _tensor(value)
    return problem


def _problem(
    shape: Sequence[int],
    value_channels: int,
    dtype: torch.dtype,
    row: Tensor | None,
    col: Tensor | None,
    lse: Tensor,
    window: Window,
    scale: float,
    pool: int,
) -> CProblem:
    """A problem of shape (B, N, D) without its inputs."""
    sizes = _sizes(
        tuple(shape), value_channels, dtype, window, scale, pool, torch.get_num_threads(), capability_index()
    )
    problem = CProblem.from_buffer_copy(sizes)
    if row is not None:
        problem.row = _embedding(row, 0)
    if col is not None:
        problem.col = _embedding(col, shape[2])
    problem.lse = lse.data_ptr()
    return problem


@functools.lru_cache(maxsize=1024)
def _sizes(
    shape: tuple[int, ...],
    value_channels: int,
    dtype: torch.dtype,
    window: Window,
    scale: float,
    pool: int,
    threads: int,
    capability: int,
) -> bytes:
    """A problem's sizes, kept from call to call: filling the structure takes longer than a small problem."""
    return bytes(
        CProblem(
            dtype=_DTYPES.index(dtype),
            border=BORDERS.index(window.border),
            threads=threads,
            capability=capability,
            scale=scale,
            batch=shape[0],
            heads=shape[1],
            channels=shape[2],
            value_channels=value_channels,
            rows=_axis(window.rows),
            cols=_axis(window.cols),
            pool=pool,
        )
    )


def _set_projection(
    problem: CProblem, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[CProjection, Tensor | None]:
    """Points the problem at the projection; what is returned must live as long as the call."""
    bias = None if bias is None else bias.contiguous()
    batch, *strides = x.stride()
    structure = CProjection(
        input=CTensor(x.data_ptr(), (batch, 0, *strides)),
        in_channels=x.shape[1],
        weight=weight.data_ptr(),
        weight_stride=weight.stride()[:2],
        bias=None if bias is None else bias.data_ptr(),
    )
    problem.projection = ctypes.pointer(structure)
    return structure, bias


def _tensor(x: Tensor) -> CTensor:
    return CTensor(x.data_ptr(), x.stride())


def _heads(x: Tensor, channels: int) -> CTensor:
    """(B, N·D, H, W) as (B, N, D, H, W)."""
    batch, channel, row, column = x.stride()
    return CTensor(x.data_ptr(), (batch, channels * channel, channel, row, column))


def _embedding(x: Tensor | None, end: int) -> CEmbedding:
    """An embedding of a head's first channels (``end`` 0), or of the last of ``end`` channels."""
    if x is None:
        return CEmbedding()
    count = x.shape[1]
    return CEmbedding(x.data_ptr(), end - count if end else 0, count, x.stride())


def _axis(axis: Axis) -> CAxis:
    return CAxis(axis.size, axis.outputs, axis.kernel, axis.stride, axis.dilation, axis.before)


def _check(status: int) -> None:
    if status == 1:
        raise MemoryError("local attention on the CPU: not enough memory for the workspace of a thread")
    if status:
        raise RuntimeError(f"local attention on the CPU: the library refused its arguments (status {status})")
