"""The forward kernel: a program computes a tile of queries of one head of one image."""

from __future__ import annotations

import triton
import triton.language as tl

from . import halo, taps
from .pixels import any_not_finite, load_pixels, place, plane, queries, store_pixels

_SIZES = ["heads", "height", "width", "out_height", "out_width", "scale"]
_STRIDES = [f"{name}_{d}" for name in "qkvo" for d in ("batch", "head", "channel", "row", "column")]


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def forward(
    query, q_batch: tl.int64, q_head: tl.int64, q_channel: tl.int64, q_row: tl.int64, q_column: tl.int64,
    key, k_batch: tl.int64, k_head: tl.int64, k_channel: tl.int64, k_row: tl.int64, k_column: tl.int64,
    value, v_batch: tl.int64, v_head: tl.int64, v_channel: tl.int64, v_row: tl.int64, v_column: tl.int64,
    output, o_batch: tl.int64, o_head: tl.int64, o_channel: tl.int64, o_row: tl.int64, o_column: tl.int64,
    lse, row, col, table, heads, height, width, out_height, out_width, scale: tl.float32,
    P: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Writes the outputs and log-sum-exps of a tile."""
    tiles_y = tl.cdiv(tl.cdiv(out_height, P.y.phases), ROWS)
    tiles_x = tl.cdiv(tl.cdiv(out_width, P.x.phases), COLUMNS)
    batch, head, phase_y, phase_x, tile_y, tile_x = place(
        heads, tiles_y, tiles_x, P.y.phases, P.x.phases, P.heads_first
    )
    of_query = plane((query, q_batch, q_head, q_channel, q_row, q_column), batch, head, P.query_layout, P.wide)
    of_key = plane((key, k_batch, k_head, k_channel, k_row, k_column), batch, head, P.key_layout, P.wide)
    of_value = plane((value, v_batch, v_head, v_channel, v_row, v_column), batch, head, P.value_layout, P.wide)
    of_output = plane((output, o_batch, o_head, o_channel, o_row, o_column), batch, head, P.output_layout, P.wide)
    of_row = row + head * P.row_channels * P.y.kernel
    of_col = col + head * P.col_channels * P.x.kernel
    of_table = table + head * P.y.kernel * P.x.kernel

    query_y, query_x, exists, y, x = queries(phase_y, phase_x, tile_y, tile_x, out_height, out_width, P, ROWS, COLUMNS)
    q = load_pixels(of_query, y + P.y.centre, x + P.x.centre, exists, P.channels, P.channels_pad, P.query_layout)

    if P.tensor_cores:
        y_m, lse_m = halo.attend(
            q, of_key, of_value, of_row, of_col, tile_y * ROWS * P.y.step, tile_x * COLUMNS * P.x.step,
            phase_y * P.y.stride - P.y.before, phase_x * P.x.stride - P.x.before, height, width, scale, P, ROWS,
            COLUMNS, BLOCK_Y, BLOCK_X, PAD_Y, PAD_X,
        )  # fmt: skip
        if any_not_finite(tl.where(exists[:, None], y_m, 0.0)):
            y_m, lse_m = taps.attend(q, of_key, of_value, of_row, of_col, of_table, y, x, height, width, scale, P, 1)
    else:
        y_m, lse_m = taps.attend(
            q, of_key, of_value, of_row, of_col, of_table, y, x, height, width, scale, P, BLOCK_X
        )  # fmt: skip
    store_pixels(of_output, query_y, query_x, exists, y_m, P.value_channels, P.value_pad, P.output_layout)
    number = batch.to(tl.int64) * heads + head
    tl.store(lse + number * out_height * out_width + query_y * out_width + query_x, lse_m, mask=exists)
