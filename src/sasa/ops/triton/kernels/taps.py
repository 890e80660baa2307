"""Tap by tap: the equation and its gradients for M pixels, element by element in float32, without tensor cores.

Right for every input, infinities and NaN included, and every dtype. It is what runs in float32, and where the
tensor-core kernels meet a number that is not finite. ``TAPS`` taps of a window's row are taken at a time; they come
first in all shapes, so that threads divide pixels and channels and sums over taps stay in registers.

Shapes: M pixels of a program, TAPS taps, C and VALUE_C channels of keys and of values, padded. ``P`` is a
:class:`~sasa.ops.triton.problem.Problem`; (y, x) are pixels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pixels import LN2, LOG2E, load_lse, load_pixels


@triton.jit
def load_embedding(embedding, taps, KERNEL: tl.constexpr, P: tl.constexpr):
    """(taps, 1, C) of one head's (D, KERNEL) embedding; zeros past its end."""
    channel = tl.arange(0, P.channels_pad)
    exists = (channel < P.channels)[None, :] & (taps < KERNEL)[:, None]
    e = tl.load(embedding + channel[None, :] * KERNEL + taps[:, None], mask=exists, other=0.0)
    return e.to(tl.float32)[:, None, :]


@triton.jit
def attend(q, key, value, row, col, y, x, height, width, scale, P: tl.constexpr, TAPS: tl.constexpr):
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
        if P.has_col:
            of_col = tl.sum(q * load_embedding(col, dx, P.x.kernel, P), 2)
        for dy in range(P.y.kernel):
            py = tl.broadcast_to((y + dy * P.y.dilation)[None, :], (TAPS, M))
            inside = inside_x & (py >= 0) & (py < height)
            k = load_pixels(key, py, px, inside, P.channels, P.channels_pad, P.key_layout).to(tl.float32)
            logits = tl.sum(q * k, 2)
            if P.has_col:
                logits += of_col
            if P.has_row:
                logits += tl.sum(q * load_embedding(row, dy + tl.arange(0, 1), P.y.kernel, P), 2)
            taken = inside
            if P.zero:
                taken = tl.broadcast_to((dx < P.x.kernel)[:, None], (TAPS, M))
            logits = tl.where(taken, logits * (scale * LOG2E), float("-inf"))
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
def query_gradient(
    q, grad, delta, lse, seen, key, value, row, col, partial, y, x, height, width, scale, P: tl.constexpr,
    TAPS: tl.constexpr,
):  # fmt: skip
    """Gradient (M, C) of the queries whose windows begin at pixels (y, x); those not ``seen`` don't exist.

    Their share of the embeddings' gradients goes to ``partial``, a (kh + kw, D) matrix, rows first.
    """
    M: tl.constexpr = q.shape[0]
    q = q.to(tl.float32)[None, :, :]
    grad = grad.to(tl.float32)[None, :, :]
    channel = tl.arange(0, P.channels_pad)
    is_channel = channel < P.channels
    grad_q = tl.full((M, P.channels_pad), 0.0, tl.float32)
    for first in range(0, P.x.kernel, TAPS):
        dx = first + tl.arange(0, TAPS)
        px = x[None, :] + dx[:, None] * P.x.dilation
        inside_x = (dx < P.x.kernel)[:, None] & (px >= 0) & (px < width)
        if P.has_col:
            by_col = tl.zeros((TAPS, M), tl.float32)
            of_col = tl.sum(q * load_embedding(col, dx, P.x.kernel, P), 2)
        for dy in range(P.y.kernel):
            py = tl.broadcast_to((y + dy * P.y.dilation)[None, :], (TAPS, M))
            inside = inside_x & (py >= 0) & (py < height)
            k = load_pixels(key, py, px, inside, P.channels, P.channels_pad, P.key_layout).to(tl.float32)
            v = load_pixels(value, py, px, inside, P.value_channels, P.value_pad, P.value_layout).to(tl.float32)
            logits = tl.sum(q * k, 2)
            if P.has_col:
                logits += of_col
            if P.has_row:
                row_e = load_embedding(row, dy + tl.arange(0, 1), P.y.kernel, P)
                logits += tl.sum(q * row_e, 2)
            taken = inside & seen[None, :]
            if P.zero:
                taken = (dx < P.x.kernel)[:, None] & seen[None, :]
            grad_weights = tl.sum(grad * v, 2)
            weights = tl.exp2(logits * (scale * LOG2E) - lse[None, :])
            grad_logits = tl.where(taken, weights * (grad_weights - delta[None, :]), 0.0)
            grad_q += tl.sum(grad_logits[:, :, None] * k, 0)
            if P.has_col:
                by_col += grad_logits
            if P.has_row:
                by_row = tl.sum(grad_logits, 0)[None, :, None]
                grad_q += tl.sum(by_row * row_e, 0)
                total = tl.sum(tl.sum(by_row * q, 1), 0) * scale
                pointers = partial + dy * P.channels + channel
                if first > 0:  # this program wrote there before, maybe by other threads
                    tl.debug_barrier()
                    total += tl.load(pointers, mask=is_channel, other=0.0)
                tl.store(pointers, total, mask=is_channel)
        if P.has_col:
            grad_q += tl.sum(by_col[:, :, None] * load_embedding(col, dx, P.x.kernel, P), 0)
            totals = tl.sum(by_col[:, :, None] * q, 1) * scale
            pointers = partial + (P.y.kernel + dx)[:, None] * P.channels + channel[None, :]
            tl.store(pointers, totals, mask=(dx < P.x.kernel)[:, None] & is_channel[None, :])
    return grad_q * scale


@triton.jit
def key_gradient(
    k, v, query, grad_output, lse_plane, delta_plane, row, col, y, x, out_height, out_width, scale, P: tl.constexpr,
    TAPS: tl.constexpr,
):  # fmt: skip
    """Gradients (M, C) of the keys and (M, VALUE_C) of the values at pixels (y, x), gathered from every query that sees
    them: that whose tap t lies on a pixel begins its window t taps before it.
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
            q = load_pixels(query, centre_y, centre_x, inside, P.channels, P.channels_pad, P.query_layout).to(
                tl.float32
            )
            grad = load_pixels(
                grad_output, query_y, query_x, inside, P.value_channels, P.value_pad, P.grad_layout
            ).to(tl.float32)  # fmt: skip
            place = query_y * out_width + query_x
            lse = load_lse(lse_plane + place, inside)
            delta = tl.load(delta_plane + place, mask=inside, other=0.0)
            keys = k
            if P.has_col:
                keys = keys + load_embedding(col, dx, P.x.kernel, P)
            if P.has_row:
                keys = keys + load_embedding(row, dy + tl.arange(0, 1), P.y.kernel, P)
            logits = tl.sum(q * keys, 2)
            weights = tl.where(inside, tl.exp2(logits * (scale * LOG2E) - lse), 0.0)
            grad_weights = tl.sum(grad * v, 2)
            grad_logits = tl.where(inside, weights * (grad_weights - delta), 0.0)
            grad_v += tl.sum(weights[:, :, None] * grad, 0)
            grad_k += tl.sum(grad_logits[:, :, None] * q, 0)
    return grad_k * scale, grad_v
