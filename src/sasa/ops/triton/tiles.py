"""Tiles: how much of a problem one program computes, and the candidates to choose from."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton

from . import interprets
from .problem import Problem

# Arguments of halo_tile, by the channels of the widest head; float32's count twice, as they take twice the shared
# memory. The first of a list is the default. Up to 64 channels the fastest on an H100 are among them (python -m
# benchmarks.tiles); the larger ones are for other GPUs. A program of one warp never waits for another warp.
HALO_TILES = {
    "forward": {
        32: [(2, 8, 64, 1, 2, 96), (2, 8, 32, 1, 2, 96), (2, 8, 32, 1)],
        64: [(4, 8, 32, 1), (2, 8, 32, 1, 2, 128), (4, 8, 32, 2)],
        128: [(8, 8, 32, 4), (4, 8, 32, 2)],
        256: [(4, 8, 16, 2)],
    },
    "query_gradients": {
        32: [(2, 8, 64, 1, 2, 128), (2, 8, 128, 1), (2, 8, 32, 1)],
        64: [(8, 8, 64, 4), (2, 8, 32, 1)],
        128: [(8, 8, 32, 4), (4, 8, 32, 2)],
        256: [(4, 8, 16, 2)],
    },
    "key_gradients": {
        32: [(4, 8, 32, 1, 2, 168), (4, 8, 32, 1), (8, 8, 64, 4)],
        64: [(8, 8, 64, 4, 1), (8, 8, 32, 2), (4, 8, 32, 2)],
        128: [(8, 8, 32, 4), (4, 8, 32, 2)],
        256: [(4, 8, 16, 2)],
    },
}
SMALL_IMAGE = 4  # pixels along a side, up to which a tile is no larger either
BLOCK_WIDTHS = (8, 16, 32)


class Tile(NamedTuple):
    """What a program computes: ROWS x COLUMNS queries (or keys), BLOCK_Y x BLOCK_X keys (or queries) at a time; tap by
    tap, BLOCK_X taps. All are powers of two. ``registers``: the most that a thread may use, 0 for any number; with
    fewer, more programs run at once.
    """

    ROWS: int
    COLUMNS: int
    BLOCK_Y: int
    BLOCK_X: int
    warps: int
    stages: int
    registers: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        """Arguments of a kernel."""
        return {name: getattr(self, name) for name in ("ROWS", "COLUMNS", "BLOCK_Y", "BLOCK_X")}


def backend() -> str:
    """Triton's name for the kind of GPU it compiles for: cuda, hip or xpu; cuda for the interpreter."""
    if interprets():
        return "cuda"
    driver: Any = triton.runtime.driver.active
    return driver.get_current_target().backend


@functools.lru_cache(1024)
def tiles_of(kernel: str, problem: Problem, small: bool) -> list[Tile]:
    """Tiles for a kernel to choose from, the default first. ``small``: images of up to SMALL_IMAGE pixels squared."""
    if not problem.tensor_cores:
        return _taps_tiles(problem)
    widest = max(problem.channels_pad, problem.value_pad) * problem.element_size // 2
    sizes = next(tiles for most, tiles in HALO_TILES[kernel].items() if widest <= most)
    if small:
        sizes = [(SMALL_IMAGE, SMALL_IMAGE, min(64, 4096 // widest), 1)]
    tiles = [tile for size in sizes if (tile := halo_tile(problem, *size))]
    return tiles or [Tile(4, 8, 4, 8, 1, 1)]


def halo_tile(
    problem: Problem, rows: int, columns: int, block: int, warps: int, stages: int = 2, registers: int = 0
) -> Tile | None:
    """The tile with blocks of the shape that covers its halo with the fewest keys."""
    if registers and backend() != "cuda":
        return None  # Triton limits registers for NVIDIA's compiler alone
    halo = problem.x.step * (columns - 1) + problem.x.kernel
    threads = warps * (64 if backend() == "hip" else 32)
    # Older versions of Triton can't gather from fewer numbers than there are threads.
    widths = [width for width in BLOCK_WIDTHS if block // width * rows * columns >= threads]
    if not widths:
        return None
    block_x = min(widths, key=lambda width: (-(-halo // width) * width, -width))
    stages = stages if problem.element_size == 2 else 1  # float32 would need twice the shared memory
    return Tile(rows, columns, block // block_x, block_x, warps, stages, registers)


def _taps_tiles(problem: Problem) -> list[Tile]:
    """Many pixels and two taps at a time, or few pixels and many taps in one warp, which is faster with wide heads."""
    channels = max(problem.channels_pad, problem.value_pad)
    pixels = min(128, max(512 // channels, min(32, 2048 // channels)))
    few = max(128 // channels, min(8, 512 // channels))
    taps = power_of_two(problem.x.kernel)
    tiles = [Tile(pixels // min(8, pixels), min(8, pixels), 1, min(2, taps), 4, 1)]
    return [*tiles, Tile(few // min(4, few), min(4, few), 1, min(8, taps), 1, 1)]


def power_of_two(n: int) -> int:
    """The next, which may be n."""
    return 1 << (n - 1).bit_length()
