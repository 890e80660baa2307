"""From tensors to launches: what a kernel is compiled for, and the choice of its tile.

Tiles are tuned on the first call of each kind of problem (window, head width, dtype, layout; not the size of the image)
that is large enough to measure, and cached on disk by Triton. Where results must be the same in every process, i.e.
under ``torch.use_deterministic_algorithms(True)``, the first of the list is used instead; so it is in Triton's
interpreter, and while a CUDA graph is captured before anything was tuned.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

from .. import memory_format
from ..window import Window
from .kernels import backward as backward_kernels
from .kernels import forward as forward_kernels
from .problem import ANY, CHANNELS, COLUMNS, Problem, TiledAxis
from .tiles import SMALL_IMAGE, Tile, power_of_two, tiles_of

MOST_TAPS = 64  # of a window on tensor cores: each query's position terms are held in registers
INTERPRETED = not isinstance(forward_kernels.forward, JITFunction)
CONSTANTS = ("P", "PAD_Y", "PAD_X", "ROWS", "COLUMNS", "BLOCK_Y", "BLOCK_X")  # the last arguments of every kernel
OPTIONS = {} if INTERPRETED else {"enable_fp_fusion": True}  # explicit, as Triton's default is about to change
LEAST_PROGRAMS = 256  # for a meaningful measurement of a tile: about two on each multiprocessor
SHARE_BYTES = 2**26  # most memory for the programs' shares of the embeddings' gradients

_axis = functools.lru_cache(1024)(TiledAxis.of)

# Forced by :func:`sasa.ops.triton.using`: True for tensor cores, False for tap by tap.
forced: bool | None = None


def problem_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    window: Window,
) -> Problem:
    """What the kernels for these tensors are compiled for; ``output`` is the output's gradient in the backward."""
    can_tf32 = query.device.type == "cuda" and torch.version.hip is None  # few of AMD's matrix cores support it
    precision = "tf32" if can_tf32 and query.dtype == torch.float32 and _allows_tf32() else "ieee"
    tensor_cores = forced
    if tensor_cores is None:
        tensor_cores = query.dtype != torch.float32 or precision == "tf32"
    if table is not None or max(window.rows.offsets, window.cols.offsets) > MOST_TAPS:
        tensor_cores = False
    least = 16 if tensor_cores else 1
    return Problem(
        y=_axis(window.rows),
        x=_axis(window.cols),
        zero=window.border == "zero",
        channels=query.shape[2],
        channels_pad=max(least, power_of_two(query.shape[2])),
        value_channels=value.shape[2],
        value_pad=max(least, power_of_two(value.shape[2])),
        row_channels=0 if row is None else row.shape[1],
        col_channels=0 if col is None else col.shape[1],
        has_table=table is not None,
        query_layout=layout(query),
        key_layout=layout(key),
        value_layout=layout(value),
        output_layout=layout(output),
        wide=any(_layout_of(x).reach >= 2**31 for x in (query, key, value, output)),
        heads_first=memory_format.is_channels_last(key),
        element_size=query.element_size(),
        tensor_cores=tensor_cores,
        precision=precision,
        sum_precision="tf32" if can_tf32 and query.dtype != torch.float32 else precision,
    )


def _allows_tf32() -> bool:
    # Replaces allow_tf32, which also sets it; allow_tf32 itself can't be read once this has been set.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


class Layout(NamedTuple):
    """Of a tensor (B, N, D, H, W) in memory.

    Attributes:
        strides: 0 along dimensions of size 1, whose stride is meaningless.
        kind: what the kernels may assume: see ``problem.py``.
        reach: elements from the first to the last of a plane.
    """

    strides: tuple[int, ...]
    kind: int
    reach: int


@functools.lru_cache(maxsize=4096)
def _layout(shape: torch.Size, strides: tuple[int, ...], element_size: int, aligned: bool) -> Layout:
    strides = tuple(stride if size > 1 else 0 for stride, size in zip(strides, shape, strict=True))
    reach = sum(abs(step) * (size - 1) for step, size in zip(strides[2:], shape[2:], strict=True))
    batch, head, channel, row, column = strides
    if channel == 1 and aligned and all(step * element_size % 16 == 0 for step in (batch, head, row, column)):
        return Layout(strides, CHANNELS, reach)
    return Layout(strides, COLUMNS if column == 1 or shape[4] == 1 else ANY, reach)


def _layout_of(x: Tensor) -> Layout:
    return _layout(x.shape, x.stride(), x.element_size(), x.data_ptr() % 16 == 0)


def layout(x: Tensor) -> int:
    """What the kernels may assume: see ``problem.py``."""
    return _layout_of(x).kind


class Ready(NamedTuple):
    """A compiled kernel and the last of its arguments, which don't depend on tensors.

    Triton would read them, and all others, on every call, to decide which of its compilations to launch: that takes
    longer than the launch.
    """

    tile: Tile
    compiled: Any
    constants: tuple[Any, ...]


_ready: dict[tuple[Any, ...], Ready] = {}


def _run(
    kernel: Any, programs: Callable[[int, int], int], problem: Problem, small: bool, arguments: Sequence[Any]
) -> Tile:
    """Launch; returns the tile.

    Args:
        kernel: to launch.
        programs: number of programs, given a tile's rows and columns.
        problem: what the kernel is compiled for.
        small: as for :func:`tiles_of`.
        arguments: of the kernel; the first is a tensor.
    """
    tiles, first = tiles_of(kernel.fn.__name__, problem, small), arguments[0]
    tile = tiles[0]
    measured = len(tiles) > 1 and not INTERPRETED and not torch.are_deterministic_algorithms_enabled()
    measured = measured and programs(tile.ROWS, tile.COLUMNS) >= LEAST_PROGRAMS
    kind = kernel.fn.__name__, problem, small, first.device, measured, _compiled_for(arguments)
    with on(first.device):
        if ready := _ready.get(kind):
            tile = ready.tile
            ready.compiled[programs(tile.ROWS, tile.COLUMNS), 1, 1](*arguments, *ready.constants)
            return tile
        pads = [max(16, power_of_two(axis.kernel)) for axis in (problem.y, problem.x)]
        options = {"P": problem, "PAD_Y": pads[0], "PAD_X": pads[1], **OPTIONS}
        best = _tune(kind, kernel, programs, tiles, arguments, options) if measured else tile
        tile = best or tile
        options |= _config(tile).all_kwargs()
        compiled = start(kernel, (programs(tile.ROWS, tile.COLUMNS),), arguments, options)
        if compiled is not None and best is not None:
            _ready[kind] = Ready(tile, compiled, tuple(options[name] for name in CONSTANTS))
    return tile


def _compiled_for(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """What Triton compiles the kernels for, beyond the problem: dtypes of tensors, whether they are aligned, and, for
    AMD GPUs, whether they are small; the numbers are excluded by ``do_not_specialize``.
    """
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    kinds = tuple((x.dtype, x.data_ptr() % 16 == 0) for x in tensors)
    if torch.version.hip is not None:
        return kinds, tuple(x.untyped_storage().nbytes() < 2**31 for x in tensors)
    return kinds


def _config(tile: Tile) -> triton.Config:
    limit = tile.registers or None
    return triton.Config(tile.sizes, num_warps=tile.warps, num_stages=tile.stages, maxnreg=limit)


_chosen: dict[tuple[Any, ...], Tile] = {}
_tuning = threading.Lock()  # Triton's tuners keep the state of a measurement on the instance


def _tune(
    kind: tuple[Any, ...],
    kernel: Any,
    programs: Callable[[int, int], int],
    tiles: list[Tile],
    arguments: Sequence[Any],
    options: dict[str, Any],
) -> Tile | None:
    """The fastest tile, measured on these arguments, or read from disk; None while a CUDA graph is captured, when
    nothing can be measured.
    """
    if arguments[0].device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    with _tuning:
        if kind not in _chosen:
            tuner = triton.autotune([_config(tile) for tile in tiles], key=["P"], cache_results=True)(kernel)
            tuner[lambda sizes: (programs(sizes["ROWS"], sizes["COLUMNS"]),)](*arguments, **options)
            best = tuner.best_config
            limit = best.maxnreg or 0
            _chosen[kind] = Tile(**best.kwargs, warps=best.num_warps, stages=best.num_stages, registers=limit)
        return _chosen[kind]


def start(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], options: dict[str, Any]) -> Any:
    """Compile and launch; returns the compiled kernel, None from Triton's interpreter."""
    return kernel[grid](*arguments, **options)


def on(device: torch.device) -> Any:
    """A context in which the tensors' device is the current one, which is where Triton launches."""
    if device.type == "cpu":
        return torch.device("cpu")
    return torch.get_device_module(device).device(device)


def _image(x: Tensor) -> tuple[Any, ...]:
    return (x, *_layout_of(x).strides)


def _embedding(x: Tensor | None, like: Tensor) -> Tensor:
    return like if x is None else x.contiguous()


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    window: Window,
    scale: float,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, N, Dv, h, w) in the memory format of ``query``, and log-sum-exp of the logits (B, N, h, w).

    ``into``: a tensor for the output.
    """
    batch, heads = query.shape[:2]
    height, width = window.rows.outputs, window.cols.outputs
    output = memory_format.empty(query, value.shape[2], height, width) if into is None else into
    lse = query.new_empty((batch, heads, height, width), dtype=torch.float32)
    if batch == 0:
        return output, lse
    problem = problem_of(query, key, value, output, row, col, table, window)
    arguments = [*_image(query), *_image(key), *_image(value), *_image(output), lse]
    arguments += [*(_embedding(x, query) for x in (row, col, table)), heads, *query.shape[3:], height, width, scale]
    programs = functools.partial(_query_tiles, problem, window, batch * heads)
    _run(forward_kernels.forward, programs, problem, _is_small(window), arguments)
    return output, lse


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    lse: Tensor,
    window: Window,
    scale: float,
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key and value in their memory formats, and of row, col and table.

    ``into``: tensors for the first three.
    """
    batch, heads = query.shape[:2]
    height, width = window.rows.outputs, window.cols.outputs
    grads = into or [memory_format.empty(x, *x.shape[2:]) for x in (query, key, value)]
    if batch == 0:
        none = [None if x is None else torch.zeros_like(x) for x in (row, col, table)]
        return grads[0], grads[1], grads[2], none[0], none[1], none[2]
    problem = problem_of(query, key, value, grad_output, row, col, table, window)
    # Gradients are written in the layouts of their tensors.
    problem = problem._replace(
        query_layout=_common(query, grads[0]),
        key_layout=_common(key, grads[1]),
        value_layout=_common(value, grads[2]),
        wide=problem.wide or any(_layout_of(grad).reach >= 2**31 for grad in grads),
    )
    if (height, width) != tuple(query.shape[3:]):
        grads[0].zero_()  # pixels that no window is centred on
    if any(math.gcd(axis.stride, axis.dilation) > 1 for axis in (problem.y, problem.x)):
        grads[1].zero_()  # pixels that no tap falls on
        grads[2].zero_()
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    small = _is_small(window)
    embeddings = [_embedding(x, query) for x in (row, col, table)]
    sizes = [heads, *query.shape[3:], height, width, scale]
    inputs = (grad_output, query, key, value, grads[0], lse, delta)
    totals = _query_gradients(inputs, embeddings, sizes, problem, window, small)
    arguments = [*_image(grad_output), *_image(query), *_image(key), *_image(value)]
    arguments += [*_image(grads[1]), *_image(grads[2]), lse, delta, *embeddings, *sizes]
    key_tiles = functools.partial(_key_tiles, problem, window, batch * heads)
    _run(backward_kernels.key_gradients, key_tiles, problem, small, arguments)
    return (
        grads[0],
        grads[1],
        grads[2],
        None if row is None else torch.empty_like(embeddings[0]).copy_(totals[0]),
        None if col is None else torch.empty_like(embeddings[1]).copy_(totals[1]),
        None if table is None else torch.empty_like(embeddings[2]).copy_(totals[2]),
    )


def _query_gradients(
    inputs: tuple[Tensor, ...],
    embeddings: list[Tensor],
    sizes: list[Any],
    problem: Problem,
    window: Window,
    small: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the gradients of the queries, and delta; return the gradients of the embeddings, (N, Dr, kh) and
    (N, Dc, kw), and of the table, (N, kh, kw), in float32.

    Every program writes its share of the latter. A few images are processed at a time, so that the memory for the
    shares does not grow with the batch.
    """
    query = inputs[1]
    batch, heads = query.shape[:2]
    row_size, col_size = problem.y.kernel * problem.row_channels, problem.x.kernel * problem.col_channels
    table_size = problem.y.kernel * problem.x.kernel if problem.has_table else 0
    size = row_size + col_size + table_size
    tiles = tiles_of("query_gradients", problem, small)
    of_image = max(_query_tiles(problem, window, heads, tile.ROWS, tile.COLUMNS) for tile in tiles)
    images = min(batch, max(1, SHARE_BYTES // (of_image * size * 4))) if size else batch
    shares = query.new_empty((of_image * images, size), dtype=torch.float32)
    totals = []
    for start in range(0, batch, images):
        part = [x[start : start + images] for x in inputs]
        programs = functools.partial(_query_tiles, problem, window, len(part[1]) * heads)
        arguments = [value for x in part[:5] for value in _image(x)]
        arguments += [*part[5:], *embeddings, shares, *sizes]
        tile = _run(backward_kernels.query_gradients, programs, problem, small, arguments)
        if size:
            used = shares[: programs(tile.ROWS, tile.COLUMNS)].unflatten(0, (len(part[1]), heads, -1))
            totals.append(used.sum((0, 2)))
    total = functools.reduce(torch.add, totals) if totals else shares.new_empty((heads, 0))
    of_row, of_col, of_table = total.split((row_size, col_size, table_size), 1)
    return (
        of_row.reshape(heads, problem.y.kernel, problem.row_channels).mT,
        of_col.reshape(heads, problem.x.kernel, problem.col_channels).mT,
        of_table.reshape(heads, problem.y.kernel, problem.x.kernel) if problem.has_table else of_table,
    )


def _common(x: Tensor, grad: Tensor) -> int:
    """The layout common to both."""
    return layout(x) if layout(x) == layout(grad) else ANY


def _over(a: int, b: int) -> int:
    """Division rounded up."""
    return -(-a // b)


def _is_small(window: Window) -> bool:
    return max(window.rows.outputs, window.cols.outputs) <= SMALL_IMAGE


def _query_tiles(problem: Problem, window: Window, planes: int, rows: int, columns: int) -> int:
    """Programs that cover all queries."""
    tiles_y = _over(_over(window.rows.outputs, problem.y.phases), rows)
    tiles_x = _over(_over(window.cols.outputs, problem.x.phases), columns)
    return planes * problem.y.phases * problem.x.phases * tiles_y * tiles_x


def _key_tiles(problem: Problem, window: Window, planes: int, rows: int, columns: int) -> int:
    """Programs that cover all keys."""
    tiles_y = _over(_over(window.rows.size, problem.y.dilation), rows)
    tiles_x = _over(_over(window.cols.size, problem.x.dilation), columns)
    return planes * problem.y.phases * problem.x.phases * tiles_y * tiles_x
