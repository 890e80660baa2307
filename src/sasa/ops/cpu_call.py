"""Calls of the C++ library (``csrc/local_attention.h``) with the addresses of CPU tensors.

Everything but the addresses is filled in once per tensor layout.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu_library import capability_index, load
from .cpu_structures import CAxis, CEmbedding, CGradients, CProblem, CProjection, CTensor
from .memory_format import EmbeddingLayout
from .window import BORDERS, Axis, Window

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of sasa_dtype
_HUGE_PAGES_FROM = 2**22  # bytes


class Layout(NamedTuple):
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
def layout(
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
    row: EmbeddingLayout | None,
    col: EmbeddingLayout | None,
    table: tuple[int, ...] | None,
    results: tuple[tuple[int, ...], ...],
) -> Layout:
    """Kept from call to call: filling the structures takes longer than a small problem.

    Args:
        shape: (B, N, D).
        value_channels: Dv.
        dtype: of all tensors.
        window: geometry.
        scale: factor on the logits.
        pool: 1 or 2.
        threads: maximum number of threads.
        capability: the instruction set.
        images: strides of query, key and value, or of a layer's input, as (B, N, D, H, W).
        layer: a layer's input channels and its weight's strides; or None.
        row: strides of the row embedding and its channels; or None.
        col: likewise of the column embedding.
        table: strides of the table.
        results: strides of the output, or of the gradients of output, query, key and value.
    """
    rows, cols = (_embedding(half, first) for half, first in ((row, 0), (col, shape[2] - (col[1] if col else 0))))
    problem = CProblem(
        dtype=DTYPES.index(dtype), border=BORDERS.index(window.border), threads=threads, capability=capability,
        scale=scale, batch=shape[0], heads=shape[1], channels=shape[2], value_channels=value_channels,
        rows=axis_of(window.rows), cols=axis_of(window.cols), row=rows, col=cols, pool=pool,
        table=_table(table, window),
    )  # fmt: skip
    projection = CProjection()
    if layer is None:
        problem.query, problem.key, problem.value = (CTensor(None, strides) for strides in images)
        addresses = [getattr(CProblem, name).offset for name in ("query", "key", "value")]
    else:
        projection = CProjection(CTensor(None, images[0]), layer[0], None, layer[1][:2], None)
        addresses = [_PROJECTION + getattr(CProjection, name).offset for name in ("input", "weight", "bias")]
    addresses += [getattr(CProblem, name).offset for name in ("row", "col", "table", "lse")]
    tensors = [CTensor(None, strides) for strides in results]
    if row is not None:
        rows = _embedding((_contiguous(row[1], window.rows.offsets), row[1]), rows.first)
    if col is not None:
        cols = _embedding((_contiguous(col[1], window.cols.offsets), col[1]), cols.first)
    tables = _table(table and _contiguous(window.rows.offsets, window.cols.offsets), window)
    last = tensors[0] if len(tensors) == 1 else CGradients(*tensors, rows, cols, tables)
    fields = ("output",) if len(tensors) == 1 else ("output", "query", "key", "value", "row", "col", "table")
    addresses += [_RESULTS + (0 if len(tensors) == 1 else getattr(CGradients, name).offset) for name in fields]
    memory = bytes(problem) + bytes(projection) + bytes(last)
    return Layout(memory, tuple(addresses), _RESULTS, layer is not None)


def call(function: Callable[[int, int], int], kept: Layout, *tensors: Tensor | int | None) -> None:
    """Call the library with the structures of ``kept`` and the addresses of the tensors that it lists."""
    memory = bytearray(kept.memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for place, x in zip(kept.addresses, tensors, strict=True):
        if x is not None:
            _ADDRESS.pack_into(memory, place, x if isinstance(x, int) else x.data_ptr())
    if kept.projected:
        _ADDRESS.pack_into(memory, CProblem.projection.offset, start + _PROJECTION)
    status = function(start, start + kept.results)
    if status:
        check(status)


def machine() -> tuple[int, int]:
    """What a call depends on besides its arguments: the number of threads and the instruction set."""
    return torch.get_num_threads(), capability_index()


def strides_of_one_head(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a layer's input (B, C, H, W) as (B, 1, C, H, W)."""
    batch, *rest = strides
    return batch, 0, *rest


def strides_of_heads(strides: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """Strides of (B, N·D, H, W) as (B, N, D, H, W)."""
    batch, channel, *pixel = strides
    return batch, channels * channel, channel, *pixel


def _contiguous(channels: int, taps: int) -> tuple[int, ...]:
    """Strides of a contiguous (N, channels, taps)."""
    return channels * taps, taps, 1


def _embedding(half: EmbeddingLayout | None, first: int) -> CEmbedding:
    return CEmbedding() if half is None else CEmbedding(None, first, half[1], half[0])


def _table(strides: tuple[int, ...] | None, window: Window) -> CEmbedding:
    """A table as an embedding whose channels are its columns."""
    if strides is None:
        return CEmbedding()
    head, row, column = strides
    return CEmbedding(None, 0, window.cols.offsets, (head, column, row))


def axis_of(axis: Axis) -> CAxis:
    """Geometry of an axis, as the library expects it."""
    return CAxis(axis.size, axis.outputs, axis.kernel, axis.stride, axis.dilation, axis.before, axis.shifted)


def check(status: int) -> None:
    """Raise if the status says that nothing was computed."""
    if status == 1:
        raise MemoryError("local attention on the CPU: not enough memory for the workspace of a thread")
    if status:
        raise RuntimeError(f"local attention on the CPU: the library refused its arguments (status {status})")


def in_huge_pages(fresh: Tensor) -> Tensor:
    """``fresh``, a new dense tensor, backed by huge pages where the system has them: page faults take half the time of
    the first write to a large tensor.
    """
    size = fresh.numel() * fresh.element_size()
    if size >= _HUGE_PAGES_FROM:
        found, _ = load()
        if found is not None and fresh.device.type == "cpu":
            found.sasa_use_huge_pages(fresh.data_ptr(), size)
    return fresh
