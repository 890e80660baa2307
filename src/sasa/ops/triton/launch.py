"""From tensors to launches: what a kernel is compiled for, its tiles, and the choice among them.

Tiles are tuned on the first call of each kind of problem (window, head width, dtype, layout; not the size of the image)
and kept on disk by Triton. Where results must be the same in every process, that is under
``torch.use_deterministic_algorithms(True)``, the first of the list is taken instead, as it is while a CUDA graph is
captured and in Triton's interpreter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpretedFunction

from .. import memory_format
from ..window import Window
from .kernels import backward as backward_kernels
from .kernels import forward as forward_kernels
from .problem import ANY, CHANNELS, COLUMNS, Axis, Problem

MOST_TAPS = 64  # of a window on tensor cores: each query's position terms are held in registers
INTERPRETED = isinstance(forward_kernels.forward, InterpretedFunction)
OPTIONS = {} if INTERPRETED else {"enable_fp_fusion": True}

# Forced by :func:`sasa.ops.triton.using`: True for tensor cores, False for tap by tap.
forced: bool | None = None


class Tile(NamedTuple):
    """What a program computes: ROWS x COLUMNS queries (or keys), BLOCK_Y x BLOCK_X keys (or queries) at a time; tap by
    tap, BLOCK_X taps.
    """

    ROWS: int
    COLUMNS: int
    BLOCK_Y: int
    BLOCK_X: int
    warps: int
    stages: int

    @property
    def sizes(self) -> dict[str, int]:
        """Arguments of a kernel."""
        return {name: getattr(self, name) for name in ("ROWS", "COLUMNS", "BLOCK_Y", "BLOCK_X")}

    @property
    def options(self) -> dict[str, int]:
        """Arguments of a launch."""
        return self.sizes if INTERPRETED else self.sizes | {"num_warps": self.warps, "num_stages": self.stages}

    @property
    def config(self) -> triton.Config:
        """As Triton's autotuner wants it."""
        return triton.Config(self.sizes, num_warps=self.warps, num_stages=self.stages)


def problem_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    grad_output: Tensor | None,
    row: Tensor | None,
    col: Tensor | None,
    window: Window,
    border: str,
) -> Problem:
    """What the kernels for these tensors are compiled for."""
    precision = "tf32" if query.dtype == torch.float32 and query.device.type == "cuda" and _allows_tf32() else "ieee"
    tensor_cores = forced
    if tensor_cores is None:
        tensor_cores = query.dtype != torch.float32 or precision == "tf32"
    if max(window.rows.kernel, window.cols.kernel) > MOST_TAPS:
        tensor_cores = False
    least = 16 if tensor_cores else 1
    images = [x for x in (query, key, value, output, grad_output) if x is not None]
    return Problem(
        y=Axis.of(window.rows),
        x=Axis.of(window.cols),
        zero=border == "zero",
        channels=query.shape[2],
        channels_pad=max(least, triton.next_power_of_2(query.shape[2])),
        value_channels=value.shape[2],
        value_pad=max(least, triton.next_power_of_2(value.shape[2])),
        has_row=row is not None,
        has_col=col is not None,
        query=layout(query),
        key=layout(key),
        value=layout(value),
        output=layout(output),
        grad_output=ANY if grad_output is None else layout(grad_output),
        wide=any(_reach(x) >= 2**31 for x in images),
        heads_first=memory_format.is_channels_last(key),
        tensor_cores=tensor_cores,
        precision=precision,
    )


def _allows_tf32() -> bool:
    # What replaces allow_tf32, and what setting that sets; allow_tf32 itself can't be read once this one was set.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def strides(x: Tensor) -> tuple[int, ...]:
    """Strides of (B, N, D, H, W), 0 along dimensions of size 1, whose stride says nothing."""
    return tuple(stride if size > 1 else 0 for stride, size in zip(x.stride(), x.shape, strict=True))


def layout(x: Tensor) -> int:
    """What the kernels may count on: see ``problem.py``."""
    batch, head, channel, row, column = strides(x)
    aligned = all(step * x.element_size() % 16 == 0 for step in (batch, head, row, column))
    if channel == 1 and aligned and x.data_ptr() % 16 == 0:
        return CHANNELS
    return COLUMNS if column == 1 or x.shape[4] == 1 else ANY


def _reach(x: Tensor) -> int:
    """Elements from the first to the last of a plane."""
    return sum(abs(step) * (size - 1) for step, size in zip(x.stride()[2:], x.shape[2:], strict=True))


# (rows, columns, keys or queries of a block, warps) on tensor cores by the widest head they are for. The first of a
# list is the default: that with which a warp runs the fewest instructions a pixel, and several fit the registers.
HALO_TILES = {
    "forward": {
        32: [(4, 8, 64, 2), (8, 8, 64, 4), (2, 8, 64, 1)],
        64: [(8, 8, 64, 4), (4, 8, 32, 2)],
        128: [(8, 8, 32, 4), (4, 8, 32, 4)],
    },
    "query_gradients": {
        32: [(4, 8, 64, 2), (8, 8, 64, 4), (2, 8, 64, 1)],
        64: [(4, 8, 32, 2), (8, 8, 64, 4)],
        128: [(8, 8, 32, 4), (4, 8, 32, 4)],
    },
    "key_gradients": {
        32: [(8, 8, 32, 2), (8, 8, 64, 4), (4, 8, 32, 2)],
        64: [(8, 8, 64, 4), (8, 8, 32, 4)],
        128: [(8, 8, 32, 4), (4, 8, 32, 4)],
    },
}
SMALL_IMAGE = 4  # pixels along a side, up to which a tile is no larger either


def tiles_of(kernel: str, problem: Problem, small: bool) -> list[Tile]:
    """Tiles for a kernel to choose from, the default first. ``small``: images of up to SMALL_IMAGE pixels squared."""
    if not problem.tensor_cores:
        return _taps_tiles(problem)
    widest = max(problem.channels_pad, problem.value_pad)
    sizes = next(tiles for most, tiles in HALO_TILES[kernel].items() if widest <= most)
    if small:
        sizes = [(SMALL_IMAGE, SMALL_IMAGE, 64 if widest <= 64 else 32, 1)]
    tiles = []
    for rows, columns, block, warps in sizes:
        halo = problem.x.step * (columns - 1) + problem.x.kernel
        block_x = min((8, 16, 32), key=lambda width: (-(-halo // width) * width, -width))
        tiles.append(Tile(rows, columns, block // block_x, block_x, warps, 2))
    return tiles


def _taps_tiles(problem: Problem) -> list[Tile]:
    """As many pixels as leave each thread four channels of one pixel, so that it sums over taps by itself."""
    channels = max(problem.channels_pad, problem.value_pad)
    widest = min(8, triton.next_power_of_2(problem.x.kernel))
    tiles = []
    for taps, warps in ((widest, 4), (widest, 2)):
        pixels = min(128, max(1, 128 * warps // channels))
        columns = min(8, pixels)
        tiles.append(Tile(pixels // columns, columns, 1, taps, warps, 1))
    return list(dict.fromkeys(tiles))


@functools.cache
def _tuner(kernel: Any, problem: Problem, small: bool) -> Autotuner:
    configs = [tile.config for tile in tiles_of(kernel.fn.__name__, problem, small)]
    return triton.autotune(configs, key=["P"], cache_results=True)(kernel)


def _run(
    kernel: Any, programs: Any, problem: Problem, small: bool, device: torch.device, arguments: Sequence[Any]
) -> Tile:
    """Launch; returns the tile. ``programs`` tells how many of them a tile needs."""
    pads = [max(16, triton.next_power_of_2(axis.kernel)) for axis in (problem.y, problem.x)]
    options = {"P": problem, "PAD_Y": pads[0], "PAD_X": pads[1], **OPTIONS}
    tiles = tiles_of(kernel.fn.__name__, problem, small)
    with _on(device):
        if len(tiles) == 1 or INTERPRETED or torch.are_deterministic_algorithms_enabled() or _capturing(device):
            tile = tiles[0]
            _launch(kernel, (programs(tile.ROWS, tile.COLUMNS),), arguments, options | tile.options)
            return tile
        tuner = _tuner(kernel, problem, small)
        tuner[lambda meta: (programs(meta["ROWS"], meta["COLUMNS"]),)](*arguments, **options)
        best = tuner.best_config
        return Tile(**best.kwargs, warps=best.num_warps, stages=best.num_stages)


def _launch(kernel: Any, grid: tuple[int], arguments: Sequence[Any], options: dict[str, Any]) -> None:
    kernel[grid](*arguments, **options)


def _on(device: torch.device) -> Any:
    """Makes the tensors' device the current one, which is where Triton launches."""
    if device.type == "cpu":
        return torch.device("cpu")
    return torch.get_device_module(device).device(device)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _image(x: Tensor) -> tuple[Any, ...]:
    return (x, *strides(x))


def _embedding(x: Tensor | None, like: Tensor) -> Tensor:
    return like if x is None else x.contiguous()


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    window: Window,
    border: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, N, Dv, h, w) in the memory format of ``query``, and log-sum-exp of the logits (B, N, h, w)."""
    batch, heads = query.shape[:2]
    height, width = window.rows.outputs, window.cols.outputs
    output = memory_format.empty(query, value.shape[2], height, width)
    lse = query.new_empty((batch, heads, height, width), dtype=torch.float32)
    if batch == 0:
        return output, lse
    problem = problem_of(query, key, value, output, None, row, col, window, border)
    arguments = [*_image(query), *_image(key), *_image(value), *_image(output), lse, _embedding(row, query)]
    arguments += [_embedding(col, query), heads, *query.shape[3:], height, width, scale]
    programs = functools.partial(_query_tiles, problem, window, batch * heads)
    _run(forward_kernels.forward, programs, problem, _is_small(window), query.device, arguments)
    return output, lse


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    output: Tensor | None,
    lse: Tensor,
    window: Window,
    border: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key and value in their memory formats, and of row and col. Without the ``output`` it is
    computed again.
    """
    batch, heads = query.shape[:2]
    height, width = window.rows.outputs, window.cols.outputs
    grads = [memory_format.empty(x, *x.shape[2:]) for x in (query, key, value)]
    if batch == 0:
        none = [None if x is None else torch.zeros_like(x) for x in (row, col)]
        return grads[0], grads[1], grads[2], none[0], none[1]
    if output is None:
        output, lse = forward(query, key, value, row, col, window, border, scale)
    if (height, width) != tuple(query.shape[3:]):
        grads[0].zero_()  # pixels that no window is centred on
    if any(math.gcd(axis.stride, axis.dilation) > 1 for axis in window):
        grads[1].zero_()  # pixels that no tap falls on
        grads[2].zero_()
    problem = problem_of(query, key, value, output, grad_output, row, col, window, border)
    # Gradients are written by the layouts of what they are gradients of.
    problem = problem._replace(
        query=_common(query, grads[0]), key=_common(key, grads[1]), value=_common(value, grads[2])
    )
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    small = _is_small(window)
    taps, channels = window.rows.kernel + window.cols.kernel, query.shape[2]
    query_tiles = functools.partial(_query_tiles, problem, window, batch * heads)
    most = max(query_tiles(tile.ROWS, tile.COLUMNS) for tile in tiles_of("query_gradients", problem, small))
    shares = query.new_empty((most if row is not None or col is not None else 0, taps, channels), dtype=torch.float32)

    inputs = [*_image(grad_output), *_image(query), *_image(key), *_image(value)]
    embeddings = [_embedding(row, query), _embedding(col, query)]
    sizes = [heads, *query.shape[3:], height, width, scale]
    arguments = [*inputs, *_image(output), *_image(grads[0]), lse, delta, *embeddings, shares, *sizes]
    tile = _run(backward_kernels.query_gradients, query_tiles, problem, small, query.device, arguments)
    arguments = [*inputs, *_image(grads[1]), *_image(grads[2]), lse, delta, *embeddings, *sizes]
    key_tiles = functools.partial(_key_tiles, problem, window, batch * heads)
    _run(backward_kernels.key_gradients, key_tiles, problem, small, query.device, arguments)

    total = None
    if len(shares):
        used = shares[: query_tiles(tile.ROWS, tile.COLUMNS)].unflatten(0, (batch, heads, -1))
        total = used.sum((0, 2)).transpose(1, 2).to(query.dtype)  # (heads, D, kh + kw)
    return (
        grads[0],
        grads[1],
        grads[2],
        None if row is None or total is None else total[..., : window.rows.kernel].contiguous(),
        None if col is None or total is None else total[..., window.rows.kernel :].contiguous(),
    )


def _common(x: Tensor, grad: Tensor) -> int:
    """What holds for both."""
    return layout(x) if layout(x) == layout(grad) else ANY


def _is_small(window: Window) -> bool:
    return max(window.rows.outputs, window.cols.outputs) <= SMALL_IMAGE


def _query_tiles(problem: Problem, window: Window, planes: int, rows: int, columns: int) -> int:
    """Programs that cover all queries."""
    tiles_y = triton.cdiv(triton.cdiv(window.rows.outputs, problem.y.phases), rows)
    tiles_x = triton.cdiv(triton.cdiv(window.cols.outputs, problem.x.phases), columns)
    return planes * problem.y.phases * problem.x.phases * tiles_y * tiles_x


def _key_tiles(problem: Problem, window: Window, planes: int, rows: int, columns: int) -> int:
    """Programs that cover all keys."""
    tiles_y = triton.cdiv(triton.cdiv(window.rows.size, problem.y.dilation), rows)
    tiles_x = triton.cdiv(triton.cdiv(window.cols.size, problem.x.dilation), columns)
    return planes * problem.y.phases * problem.x.phases * tiles_y * tiles_x
