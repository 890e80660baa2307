"""Tap by tap: the equation and its gradients for M pixels, element by element in float32, without tensor cores.

Correct for every input, infinities and NaN included, and every dtype. It is used for float32, and where the tensor-core
kernels meet a non-finite number. ``TAPS`` taps of a window's row are taken at a time; they come first in all shapes, so
that threads divide pixels and channels and sums over taps stay in registers.

Shapes: M pixels of a program, TAPS taps, C and VALUE_C channels of keys and of values, padded. ``P`` is a
:class:`~sasa.ops.triton.problem.Problem`; (y, x) are pixels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pixels import LN2, LOG2E, load_lse, load_pixels, sees


@triton.jit
def _embedding(embedding, taps, KERNEL: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, P: tl.constexpr):
    """(taps, 1, C) of one head's (COUNT, KERNEL) embedding of the channels from FIRST; zeros outside of it."""
    channel = tl.arange(0, P.channels_pad) - FIRST
    exists = ((channel >= 0) & (channel < COUNT))[None, :] & (taps < KERNEL)[:, None]
    e = tl.load(embedding + channel[None, :] * KERNEL + taps[:, None], mask=exists, other=0.0)
    return e.to(tl.float32)[:, None, :]


@triton.jit
def _row_embedding(row, dy, P: tl.constexpr):
    """(1, 1, C): the embedding of the window's row ``dy``."""
    return _embedding(row, dy + tl.arange(0, 1), P.y.kernel, 0, P.row_channels, P)


@triton.jit
def _col_embedding(col, dx, P: tl.constexpr):
    """(TAPS, 1, C): the embeddings of the window's columns ``dx``."""
    return _embedding(col, dx, P.x.kernel, P.channels - P.col_channels, P.col_channels, P)


@triton.jit
def _of_table(table, dy, dx, P: tl.constexpr):
    """(TAPS, 1): what the table adds to the logits of the taps (dy, dx), in base 2."""
    return (tl.load(table + dy * P.x.kernel + dx, mask=dx < P.x.kernel, other=0.0).to(tl.float32) * LOG2E)[:, None]


@triton.jit
def attend(q, key, value, row, col, table, y, x, height, width, scale, P: tl.constexpr, TAPS: tl.constexpr):
    """Outputs (M, VALUE_C) and log-sum-exp (M) of the queries ``q`` (M, C) whose windows begin at pixels (y, x)."""
    M: tl.constexpr = q.shape[0]
    q = q.to(tl.float32)[None, :, :]
    largest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    output = tl.full((M, P.value_pad), 0.0, tl.float32)
    for first in range(0, P.x.kernel, TAPS):
        dx = first + tl.arange(0, TAPS)
        px = x[None, :] + dx[:, None] * P.x.dilation
        inside_x = (dx < P.x.kernel)[:, None] & (px >= 0) & (px < width)
        inside_x = sees(inside_x, (x + P.x.centre)[None, :], px, width, P.x.moved, P.x.dilation)
        if P.col_channels > 0:
            of_col = tl.sum(q * _col_embedding(col, dx, P), 2)
        for dy in range(P.y.kernel):
            py = tl.broadcast_to((y + dy * P.y.dilation)[None, :], (TAPS, M))
            inside = inside_x & (py >= 0) & (py < height)
            inside = sees(inside, (y + P.y.centre)[None, :], py, height, P.y.moved, P.y.dilation)
            k = load_pixels(key, py, px, inside, P.channels, P.channels_pad, P.key_layout).to(tl.float32)
            logits = tl.sum(q * k, 2)
            if P.col_channels > 0:
                logits += of_col
            if P.row_channels > 0:
                logits += tl.sum(q * _row_embedding(row, dy, P), 2)
            taken = inside
            if P.zero:
                taken = tl.broadcast_to((dx < P.x.kernel)[:, None], (TAPS, M))
            logits *= scale * LOG2E
            if P.has_table:
                logits += _of_table(table, dy, dx, P)
            logits = tl.where(taken, logits, float("-inf"))
            before = largest
            largest = tl.maximum(before, tl.max(logits, 0))
            base = tl.where(largest == float("-inf"), 0.0, largest)
            weights = tl.exp2(logits - base[None, :])
            shrink = tl.exp2(before - base)
            total = total * shrink + tl.sum(weights, 0)
            v = load_pixels(value, py, px, inside, P.value_channels, P.value_pad, P.value_layout).to(tl.float32)
            output = output * shrink[:, None] + tl.sum(weights[:, :, None] * v, 0)
    lse = tl.where(largest == float("inf"), largest, largest * LN2 + tl.log(total))
    return output / total[:, None], lse


@triton.jit
def _weigh(
    q, grad, lse, seen, of_col, key, value, row, table, y, x, dy, dx, height, width, scale, P: tl.constexpr,
    TAPS: tl.constexpr,
):  # fmt: skip
    """Of the taps (dy, dx) of the queries whose windows begin at pixels (y, x), those ``seen``: keys (TAPS, M, C), and
    (TAPS, M) whether a tap takes part, the weights, and the weights' gradients.
    """
    px = x[None, :] + dx[:, None] * P.x.dilation
    py = tl.broadcast_to((y + dy * P.y.dilation)[None, :], (TAPS, y.shape[0]))
    exists = (dx < P.x.kernel)[:, None] & seen[None, :]
    inside = exists & (px >= 0) & (px < width) & (py >= 0) & (py < height)
    inside = sees(inside, (x + P.x.centre)[None, :], px, width, P.x.moved, P.x.dilation)
    inside = sees(inside, (y + P.y.centre)[None, :], py, height, P.y.moved, P.y.dilation)
    k = load_pixels(key, py, px, inside, P.channels, P.channels_pad, P.key_layout).to(tl.float32)
    v = load_pixels(value, py, px, inside, P.value_channels, P.value_pad, P.value_layout).to(tl.float32)
    logits = tl.sum(q * k, 2) + of_col
    if P.row_channels > 0:
        logits += tl.sum(q * _row_embedding(row, dy, P), 2)
    taken = inside
    if P.zero:
        taken = exists
    logits *= scale * LOG2E
    if P.has_table:
        logits += _of_table(table, dy, dx, P)
    return k, taken, tl.exp2(logits - lse[None, :]), tl.sum(grad * v, 2)


@triton.jit
def query_gradient(
    q, grad, lse, seen, key, value, row, col, table, partial, y, x, height, width, scale, P: tl.constexpr,
    TAPS: tl.constexpr,
):  # fmt: skip
    """Gradient (M, C) and delta (M) of the queries whose windows begin at pixels (y, x); those not ``seen`` don't
    exist.

    Their share of the embeddings' gradients goes to ``partial``: a (kh, Dr) matrix, then a (kw, Dc) matrix, then
    a (kh, kw) table.
    """
    M: tl.constexpr = q.shape[0]
    FIRST: tl.constexpr = P.channels - P.col_channels
    q = q.to(tl.float32)[None, :, :]
    grad = grad.to(tl.float32)[None, :, :]
    channel = tl.arange(0, P.channels_pad)
    of_col = tl.zeros((TAPS, M), tl.float32)
    delta = tl.zeros((M,), tl.float32)
    for first in range(0, P.x.kernel, TAPS):
        dx = first + tl.arange(0, TAPS)
        if P.col_channels > 0:
            of_col = tl.sum(q * _col_embedding(col, dx, P), 2)
        for dy in range(P.y.kernel):
            _, taken, weights, grad_weights = _weigh(
                q, grad, lse, seen, of_col, key, value, row, table, y, x, dy, dx, height, width, scale, P, TAPS
            )
            delta += tl.sum(tl.where(taken, weights * grad_weights, 0.0), 0)

    grad_q = tl.full((M, P.channels_pad), 0.0, tl.float32)
    for first in range(0, P.x.kernel, TAPS):
        dx = first + tl.arange(0, TAPS)
        if P.col_channels > 0:
            by_col = tl.zeros((TAPS, M), tl.float32)
            of_col = tl.sum(q * _col_embedding(col, dx, P), 2)
        for dy in range(P.y.kernel):
            k, taken, weights, grad_weights = _weigh(
                q, grad, lse, seen, of_col, key, value, row, table, y, x, dy, dx, height, width, scale, P, TAPS
            )
            grad_logits = tl.where(taken, weights * (grad_weights - delta[None, :]), 0.0)
            grad_q += tl.sum(grad_logits[:, :, None] * k, 0)
            if P.has_table:
                pointers = partial + P.y.kernel * P.row_channels + P.x.kernel * P.col_channels + dy * P.x.kernel + dx
                tl.store(pointers, tl.sum(grad_logits, 1), mask=dx < P.x.kernel)
            if P.col_channels > 0:
                by_col += grad_logits
            if P.row_channels > 0:
                by_row = tl.sum(grad_logits, 0)[None, :, None]
                grad_q += tl.sum(by_row * _row_embedding(row, dy, P), 0)
                total = tl.sum(tl.sum(by_row * q, 1), 0) * scale
                pointers = partial + dy * P.row_channels + channel
                exists = channel < P.row_channels
                if first > 0:  # this program wrote there before, perhaps by other threads
                    tl.debug_barrier()
                    total += tl.load(pointers, mask=exists, other=0.0)
                tl.store(pointers, total, mask=exists)
        if P.col_channels > 0:
            grad_q += tl.sum(by_col[:, :, None] * _col_embedding(col, dx, P), 0)
            totals = tl.sum(by_col[:, :, None] * q, 1) * scale
            pointers = partial + P.y.kernel * P.row_channels + dx[:, None] * P.col_channels + (channel - FIRST)[None, :]
            exists = (dx < P.x.kernel)[:, None] & ((channel >= FIRST) & (channel < P.channels))[None, :]
            tl.store(pointers, totals, mask=exists)
    return grad_q * scale, delta


@triton.jit
def key_gradient(
    k, v, query, grad_output, lse_plane, delta_plane, row, col, table, y, x, height, width, out_height, out_width,
    scale, P: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Gradients (M, C) of the keys and (M, VALUE_C) of the values at pixels (y, x), gathered from every query that sees
    them: the query whose tap t lies on a pixel begins its window t taps before it.
    """
    M: tl.constexpr = k.shape[0]
    k = k.to(tl.float32)[None, :, :]
    v = v.to(tl.float32)[None, :, :]
    grad_k = tl.full((M, P.channels_pad), 0.0, tl.float32)
    grad_v = tl.full((M, P.value_pad), 0.0, tl.float32)
    for first in range(0, P.x.kernel, TAPS):
        dx = first + tl.arange(0, TAPS)
        from_x = x[None, :] + P.x.before - dx[:, None] * P.x.dilation
        query_x = from_x // P.x.stride
        inside_x = (dx < P.x.kernel)[:, None] & (from_x >= 0) & (from_x % P.x.stride == 0) & (query_x < out_width)
        for dy in range(P.y.kernel):
            from_y = tl.broadcast_to((y + P.y.before - dy * P.y.dilation)[None, :], (TAPS, M))
            query_y = from_y // P.y.stride
            inside = inside_x & (from_y >= 0) & (from_y % P.y.stride == 0) & (query_y < out_height)
            centre_y = query_y * P.y.stride - P.y.before + P.y.centre
            centre_x = query_x * P.x.stride - P.x.before + P.x.centre
            inside = sees(inside, centre_y, y[None, :], height, P.y.moved, P.y.dilation)
            inside = sees(inside, centre_x, x[None, :], width, P.x.moved, P.x.dilation)
            q = load_pixels(query, centre_y, centre_x, inside, P.channels, P.channels_pad, P.query_layout).to(
                tl.float32
            )
            grad = load_pixels(
                grad_output, query_y, query_x, inside, P.value_channels, P.value_pad, P.output_layout
            ).to(tl.float32)  # fmt: skip
            place = query_y * out_width + query_x
            lse = load_lse(lse_plane + place, inside)
            delta = tl.load(delta_plane + place, mask=inside, other=0.0)
            keys = k
            if P.col_channels > 0:
                keys = keys + _col_embedding(col, dx, P)
            if P.row_channels > 0:
                keys = keys + _row_embedding(row, dy, P)
            logits = tl.sum(q * keys, 2) * (scale * LOG2E)
            if P.has_table:
                logits += _of_table(table, dy, dx, P)
            weights = tl.where(inside, tl.exp2(logits - lse), 0.0)
            grad_weights = tl.sum(grad * v, 2)
            grad_logits = tl.where(inside, weights * (grad_weights - delta), 0.0)
            grad_v += tl.sum(weights[:, :, None] * grad, 0)
            grad_k += tl.sum(grad_logits[:, :, None] * q, 0)
    return grad_k * scale, grad_v
