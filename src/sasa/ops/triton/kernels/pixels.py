"""What the kernels share: the place of a program, loading and storing pixels.

A tensor of images is a tuple (pointer to its element 0, strides of batch, head, channel, row, column); :func:`plane`
takes one head of one image out of it. Shapes: M queries or keys of a program, J taps or keys at a time, C channels,
C_PAD their next power of two. From plane to plane offsets are 64 bits wide; inside a plane they are 32 unless WIDE.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import problem

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
CHANNELS = tl.constexpr(problem.CHANNELS)
COLUMNS = tl.constexpr(problem.COLUMNS)


@triton.jit
def place(heads, tiles_y, tiles_x, PHASES_Y: tl.constexpr, PHASES_X: tl.constexpr, HEADS_FIRST: tl.constexpr):
    """(batch, head, phase y, phase x, tile y, tile x) of this program.

    Programs that run together should read neighbouring memory: the heads of one tile where a pixel's channels follow
    each other, the tiles of one head where its pixels do.
    """
    rest = tl.program_id(0)
    head = rest % heads
    if HEADS_FIRST:
        rest = rest // heads
    tile_x = rest % tiles_x
    rest = rest // tiles_x
    tile_y = rest % tiles_y
    rest = rest // tiles_y
    phase_x = rest % PHASES_X
    rest = rest // PHASES_X
    phase_y = rest % PHASES_Y
    rest = rest // PHASES_Y
    if not HEADS_FIRST:
        head = rest % heads
        rest = rest // heads
    return rest, head, phase_y, phase_x, tile_y, tile_x


@triton.jit
def queries(
    phase_y, phase_x, tile_y, tile_x, out_height, out_width, P: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The queries of a tile: rows, columns, whether they exist, and the pixels (y, x) at which their windows begin."""
    m = tl.arange(0, ROWS * COLUMNS)
    query_y = phase_y + P.y.phases * (tile_y * ROWS + m // COLUMNS)
    query_x = phase_x + P.x.phases * (tile_x * COLUMNS + m % COLUMNS)
    exists = (query_y < out_height) & (query_x < out_width)
    return query_y, query_x, exists, query_y * P.y.stride - P.y.before, query_x * P.x.stride - P.x.before


@triton.jit
def first_place(query, size, MOVED: tl.constexpr, DILATION: tl.constexpr):
    """Where the window of the query at a pixel begins, in steps of the dilation, if windows are moved inside."""
    last = (size - 1 - query % DILATION) // DILATION - (MOVED - 1)
    return tl.maximum(tl.minimum(query // DILATION - (MOVED - 1) // 2, last), 0)


@triton.jit
def sees(inside, query, key, size, MOVED: tl.constexpr, DILATION: tl.constexpr):
    """``inside``, and whether the window of the query at a pixel holds the key at another, if windows are moved."""
    if MOVED > 0:
        steps = key // DILATION - first_place(query, size, MOVED, DILATION)
        inside = inside & (steps >= 0) & (steps < MOVED)
    return inside


@triton.jit
def plane(images, batch, head, LAYOUT: tl.constexpr, WIDE: tl.constexpr):
    """One head of one image: (pointer to its first pixel's first channel, strides of channel, row, column)."""
    pointer = images[0]
    batch_stride = images[1]
    head_stride = images[2]
    channel_stride = images[3]
    row_stride = images[4]
    column_stride = images[5]
    if not WIDE:
        channel_stride = channel_stride.to(tl.int32)
        row_stride = row_stride.to(tl.int32)
        column_stride = column_stride.to(tl.int32)
    start = pointer + (batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride)
    if LAYOUT == CHANNELS:
        start = tl.multiple_of(start, 16)
    return start, channel_stride, row_stride, column_stride


@triton.jit
def _pointers(plane, y, x, LAYOUT: tl.constexpr, C_PAD: tl.constexpr):
    """Pointers to the channels of pixels, along a new last dimension."""
    pixel = y * plane[2]
    if LAYOUT == COLUMNS:
        pixel += x
    else:
        pixel += x * plane[3]
    channel = tl.arange(0, C_PAD)
    if LAYOUT == CHANNELS:
        pixel = tl.multiple_of(pixel, [128 // plane[0].dtype.element_ty.primitive_bitwidth] * len(pixel.shape))
    else:
        channel = channel * plane[1]
    if len(pixel.shape) == 1:
        offset = pixel[:, None] + channel[None, :]
    else:
        offset = pixel[:, :, None] + channel[None, None, :]
    return plane[0] + offset


@triton.jit
def _mask(inside, C: tl.constexpr, C_PAD: tl.constexpr):
    """Whether pixel and channel exist. Where all channels do, only pixels are masked, so that loads can be wide."""
    if len(inside.shape) == 1:
        mask = inside[:, None]
        if C != C_PAD:
            mask = mask & (tl.arange(0, C_PAD) < C)[None, :]
    else:
        mask = inside[:, :, None]
        if C != C_PAD:
            mask = mask & (tl.arange(0, C_PAD) < C)[None, None, :]
    return mask


@triton.jit
def load_pixels(plane, y, x, inside, C: tl.constexpr, C_PAD: tl.constexpr, LAYOUT: tl.constexpr):
    """Channels of the pixels (y, x), (..., C_PAD): zeros where not inside, and after the last channel."""
    return tl.load(_pointers(plane, y, x, LAYOUT, C_PAD), mask=_mask(inside, C, C_PAD), other=0.0)


@triton.jit
def store_pixels(plane, y, x, inside, values, C: tl.constexpr, C_PAD: tl.constexpr, LAYOUT: tl.constexpr):
    """Write channels of the pixels (y, x) that are inside, rounded to the tensor's dtype."""
    rounded = values.to(plane[0].dtype.element_ty)
    tl.store(_pointers(plane, y, x, LAYOUT, C_PAD), rounded, mask=_mask(inside, C, C_PAD))


@triton.jit
def any_not_finite(x):
    """Whether there is an infinity or NaN among the numbers."""
    return tl.max(tl.ravel(tl.where(tl.abs(x) < float("inf"), 0, 1)), 0) > 0


@triton.jit
def load_lse(pointer, inside):
    """Log-sum-exp in base 2. An infinite sum comes from an infinite logit, whose softmax is NaN throughout."""
    lse = tl.load(pointer, mask=inside, other=0.0)
    return tl.where(lse == float("inf"), float("nan"), lse) * LOG2E
