"""The backward kernels: one computes the gradients of a tile of queries, one those of a tile of keys and values.

No two programs write to the same place, and none adds to what another wrote: each program writes its share of the
gradients of the embeddings, and the shares are summed in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import halo, taps
from .pixels import any_not_finite, load_lse, load_pixels, place, plane, queries, store_pixels

_SIZES = ["heads", "height", "width", "out_height", "out_width", "scale"]
_STRIDES = [f"{name}_{d}" for name in "gqkv" for d in ("batch", "head", "channel", "row", "column")]
_STRIDES += [f"d{name}_{d}" for name in "qkv" for d in ("batch", "head", "channel", "row", "column")]


@triton.jit(do_not_specialize=_SIZES + [name for name in _STRIDES if not name.startswith(("dk", "dv"))])
def query_gradients(
    grad_output, g_batch: tl.int64, g_head: tl.int64, g_channel: tl.int64, g_row: tl.int64, g_column: tl.int64,
    query, q_batch: tl.int64, q_head: tl.int64, q_channel: tl.int64, q_row: tl.int64, q_column: tl.int64,
    key, k_batch: tl.int64, k_head: tl.int64, k_channel: tl.int64, k_row: tl.int64, k_column: tl.int64,
    value, v_batch: tl.int64, v_head: tl.int64, v_channel: tl.int64, v_row: tl.int64, v_column: tl.int64,
    grad_query, dq_batch: tl.int64, dq_head: tl.int64, dq_channel: tl.int64, dq_row: tl.int64, dq_column: tl.int64,
    lse, delta, row, col, table, partial, heads, height, width, out_height, out_width, scale: tl.float32,
    P: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Writes a tile's gradient of the queries, its delta, and its share of the gradients of the embeddings.

    Delta is grad_output · output, the mean of the weights' gradients under the weights, which the gradient of every
    logit needs. It is summed in a pass of its own over the taps, for which the output need not exist.
    """
    tiles_y = tl.cdiv(tl.cdiv(out_height, P.y.phases), ROWS)
    tiles_x = tl.cdiv(tl.cdiv(out_width, P.x.phases), COLUMNS)
    batch, head, phase_y, phase_x, tile_y, tile_x = place(
        heads, tiles_y, tiles_x, P.y.phases, P.x.phases, P.heads_first
    )
    of_grad = plane((grad_output, g_batch, g_head, g_channel, g_row, g_column), batch, head, P.output_layout, P.wide)
    of_query = plane((query, q_batch, q_head, q_channel, q_row, q_column), batch, head, P.query_layout, P.wide)
    of_key = plane((key, k_batch, k_head, k_channel, k_row, k_column), batch, head, P.key_layout, P.wide)
    of_value = plane((value, v_batch, v_head, v_channel, v_row, v_column), batch, head, P.value_layout, P.wide)
    of_grad_q = plane(
        (grad_query, dq_batch, dq_head, dq_channel, dq_row, dq_column), batch, head, P.query_layout, P.wide
    )
    of_row = row + head * P.row_channels * P.y.kernel
    of_col = col + head * P.col_channels * P.x.kernel
    of_table = table + head * P.y.kernel * P.x.kernel

    query_y, query_x, exists, y, x = queries(phase_y, phase_x, tile_y, tile_x, out_height, out_width, P, ROWS, COLUMNS)
    q = load_pixels(of_query, y + P.y.centre, x + P.x.centre, exists, P.channels, P.channels_pad, P.query_layout)
    grad = load_pixels(of_grad, query_y, query_x, exists, P.value_channels, P.value_pad, P.output_layout)
    number = batch.to(tl.int64) * heads + head
    at = number * out_height * out_width + query_y * out_width + query_x
    lse_m = load_lse(lse + at, exists)
    tile = ((phase_y * P.x.phases + phase_x) * tiles_y + tile_y) * tiles_x + tile_x
    tiles = tiles_y * tiles_x * P.y.phases * P.x.phases
    size = P.y.kernel * P.row_channels + P.x.kernel * P.col_channels
    if P.has_table:
        size += P.y.kernel * P.x.kernel
    share = partial + (number * tiles + tile) * size

    if P.tensor_cores:
        grad_q, delta_m = halo.query_gradient(
            q, grad, lse_m, of_key, of_value, of_row, of_col, share, tile_y * ROWS * P.y.step,
            tile_x * COLUMNS * P.x.step, phase_y * P.y.stride - P.y.before, phase_x * P.x.stride - P.x.before, height,
            width, scale, P, ROWS, COLUMNS, BLOCK_Y, BLOCK_X, PAD_Y, PAD_X,
        )  # fmt: skip
        if any_not_finite(tl.where(exists[:, None], grad_q, 0.0)):
            tl.debug_barrier()  # the share is written again, perhaps by other threads
            grad_q, delta_m = taps.query_gradient(
                q, grad, lse_m, exists, of_key, of_value, of_row, of_col, of_table, share, y, x, height, width,
                scale, P, 1,
            )  # fmt: skip
    else:
        grad_q, delta_m = taps.query_gradient(
            q, grad, lse_m, exists, of_key, of_value, of_row, of_col, of_table, share, y, x, height, width, scale,
            P, BLOCK_X,
        )  # fmt: skip
    tl.store(delta + at, delta_m, mask=exists)
    store_pixels(of_grad_q, y + P.y.centre, x + P.x.centre, exists, grad_q, P.channels, P.channels_pad, P.query_layout)


@triton.jit(do_not_specialize=_SIZES + [name for name in _STRIDES if not name.startswith("dq")])
def key_gradients(
    grad_output, g_batch: tl.int64, g_head: tl.int64, g_channel: tl.int64, g_row: tl.int64, g_column: tl.int64,
    query, q_batch: tl.int64, q_head: tl.int64, q_channel: tl.int64, q_row: tl.int64, q_column: tl.int64,
    key, k_batch: tl.int64, k_head: tl.int64, k_channel: tl.int64, k_row: tl.int64, k_column: tl.int64,
    value, v_batch: tl.int64, v_head: tl.int64, v_channel: tl.int64, v_row: tl.int64, v_column: tl.int64,
    grad_key, dk_batch: tl.int64, dk_head: tl.int64, dk_channel: tl.int64, dk_row: tl.int64, dk_column: tl.int64,
    grad_value, dv_batch: tl.int64, dv_head: tl.int64, dv_channel: tl.int64, dv_row: tl.int64, dv_column: tl.int64,
    lse, delta, row, col, table, heads, height, width, out_height, out_width, scale: tl.float32,
    P: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of a tile of keys and values. The tiles of a phase cover the pixels under its windows."""
    tiles_y = tl.cdiv(tl.cdiv(height, P.y.dilation), ROWS)
    tiles_x = tl.cdiv(tl.cdiv(width, P.x.dilation), COLUMNS)
    batch, head, phase_y, phase_x, tile_y, tile_x = place(
        heads, tiles_y, tiles_x, P.y.phases, P.x.phases, P.heads_first
    )
    of_grad = plane((grad_output, g_batch, g_head, g_channel, g_row, g_column), batch, head, P.output_layout, P.wide)
    of_query = plane((query, q_batch, q_head, q_channel, q_row, q_column), batch, head, P.query_layout, P.wide)
    of_key = plane((key, k_batch, k_head, k_channel, k_row, k_column), batch, head, P.key_layout, P.wide)
    of_value = plane((value, v_batch, v_head, v_channel, v_row, v_column), batch, head, P.value_layout, P.wide)
    of_grad_k = plane((grad_key, dk_batch, dk_head, dk_channel, dk_row, dk_column), batch, head, P.key_layout, P.wide)
    of_grad_v = plane(
        (grad_value, dv_batch, dv_head, dv_channel, dv_row, dv_column), batch, head, P.value_layout, P.wide
    )
    of_row = row + head * P.row_channels * P.y.kernel
    of_col = col + head * P.col_channels * P.x.kernel
    of_table = table + head * P.y.kernel * P.x.kernel
    number = (batch.to(tl.int64) * heads + head) * out_height * out_width

    # In units of the dilation, counted from the first tap of the phase's first query, the image's first row.
    to_y = P.y.before - phase_y * P.y.stride
    to_x = P.x.before - phase_x * P.x.stride
    lead_y = _ceil_div(to_y, P.y.dilation) + tile_y * ROWS
    lead_x = _ceil_div(to_x, P.x.dilation) + tile_x * COLUMNS
    m = tl.arange(0, ROWS * COLUMNS)
    y = (lead_y + m // COLUMNS) * P.y.dilation - to_y
    x = (lead_x + m % COLUMNS) * P.x.dilation - to_x
    exists = (y < height) & (x < width)
    k = load_pixels(of_key, y, x, exists, P.channels, P.channels_pad, P.key_layout)
    v = load_pixels(of_value, y, x, exists, P.value_channels, P.value_pad, P.value_layout)

    if P.tensor_cores:
        grad_k, grad_v = halo.key_gradient(
            k, v, of_query, of_grad, lse + number, delta + number, of_row, of_col, lead_y, lead_x, phase_y, phase_x,
            height, width, out_height, out_width, scale, P, ROWS, COLUMNS, BLOCK_Y, BLOCK_X, PAD_Y, PAD_X,
        )  # fmt: skip
        k_exists = tl.where(exists[:, None], grad_k, 0.0)
        v_exists = tl.where(exists[:, None], grad_v, 0.0)
        if any_not_finite(k_exists) | any_not_finite(v_exists):
            grad_k, grad_v = taps.key_gradient(
                k, v, of_query, of_grad, lse + number, delta + number, of_row, of_col, of_table, y, x, height,
                width, out_height, out_width, scale, P, 1,
            )  # fmt: skip
    else:
        grad_k, grad_v = taps.key_gradient(
            k, v, of_query, of_grad, lse + number, delta + number, of_row, of_col, of_table, y, x, height, width,
            out_height, out_width, scale, P, BLOCK_X,
        )  # fmt: skip
    store_pixels(of_grad_k, y, x, exists, grad_k, P.channels, P.channels_pad, P.key_layout)
    store_pixels(of_grad_v, y, x, exists, grad_v, P.value_channels, P.value_pad, P.value_layout)


@triton.jit
def _ceil_div(a, B: tl.constexpr):
    """Division rounded up, also of numbers below 0, which Triton rounds towards 0."""
    return tl.where(a > 0, (a + B - 1) // B, a // B)
