"""On tensor cores: a tile of queries against every key that any of them sees, the tile's halo, block by block.

The logits of a block are one matrix product. Each query adds its position terms to it, or -inf where a key lies outside
its window. The position terms of a query are two short rows, q·row and q·col; in the coordinates of the halo each
query's are shifted by its place in the tile. Where dilated, coordinates count in units of the dilation (see
:class:`~sasa.ops.triton.problem.TiledAxis`).

A key outside of a query's window gets weight 0, but 0 times infinity is NaN: the kernels detect non-finite results and
recompute such tiles tap by tap (``taps.py``).

Shapes: M queries (or keys) of a tile of ROWS x COLUMNS, J keys (queries) of a block of BLOCK_Y x BLOCK_X, C and VALUE_C
channels, padded; PAD_Y and PAD_X taps, padded. ``P`` is a :class:`~sasa.ops.triton.problem.Problem`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pixels import LN2, LOG2E, first_place, load_lse, load_pixels, sees

# Triton's interpreter multiplies the bits of bfloat16 as if they were integers; float32 gives the same products.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b, total, P: tl.constexpr):
    """The product a @ b + total, summed in float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=P.precision)


@triton.jit
def _negated_if(x, condition):
    """-x or x, exactly; Triton's interpreter can't negate bfloat16."""
    if condition:
        x = (-x.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _embedding(
    embedding, KERNEL: tl.constexpr, PAD: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """One head's (COUNT, KERNEL) embedding of the channels from FIRST as (C, PAD), zeros outside of it."""
    channel = tl.arange(0, P.channels_pad) - FIRST
    tap = tl.arange(0, PAD)
    exists = ((channel >= 0) & (channel < COUNT))[:, None] & (tap < KERNEL)[None, :]
    return tl.load(embedding + channel[:, None] * KERNEL + tap[None, :], mask=exists, other=0.0)


@triton.jit
def _row_terms(q, row, PAD: tl.constexpr, P: tl.constexpr):
    """Products of the queries with the row embedding, for every row of the window: (queries, PAD)."""
    if P.row_channels > 0:
        return _dot(q, _embedding(row, P.y.kernel, PAD, 0, P.row_channels, P), None, P)
    return tl.zeros((q.shape[0], PAD), tl.float32)


@triton.jit
def _col_terms(q, col, PAD: tl.constexpr, P: tl.constexpr):
    """Products of the queries with the column embedding, for every column of the window: (queries, PAD)."""
    if P.col_channels > 0:
        return _dot(q, _embedding(col, P.x.kernel, PAD, P.channels - P.col_channels, P.col_channels, P), None, P)
    return tl.zeros((q.shape[0], PAD), tl.float32)


@triton.jit
def _bias(terms, tap, exists, factor, HAS: tl.constexpr, KERNEL: tl.constexpr):
    """Terms added to the logits: factor · terms[m, tap[m, j]]; -inf outside of the window and where not ``exists``."""
    exists = exists & (tap >= 0) & (tap < KERNEL)
    if HAS:
        bias = tl.gather(terms, tl.where(exists, tap, 0), 1) * factor
    else:
        bias = tl.zeros(tap.shape, tl.float32)
    return tl.where(exists, bias, float("-inf"))


@triton.jit
def _range(
    lead, first, size, COUNT: tl.constexpr, STEP: tl.constexpr, KERNEL: tl.constexpr, MOVED: tl.constexpr,
    DILATION: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """First and last + 1 of the rows (columns) that take part of the halo of COUNT queries: all with a border of zeros,
    else those inside the image, and under windows that are moved. Row a lies on the image's row
    first + (lead + a) · dilation. Triton rounds quotients towards 0, which for a negative ``begin`` doesn't matter.
    """
    begin = 0
    end = STEP * (COUNT - 1) + KERNEL
    start = first + lead * DILATION
    if not ZERO:
        begin = tl.maximum(0, (DILATION - 1 - start) // DILATION)
        end = tl.minimum(end, (size - 1 - start) // DILATION + 1)
    if MOVED > 0:
        query = start + (MOVED - 1) * DILATION
        to_row = MOVED - 1 - query // DILATION  # from steps of the dilation
        last = query + (COUNT - 1) * STEP * DILATION
        begin = tl.maximum(begin, first_place(query, size, MOVED, DILATION) + to_row)
        end = tl.minimum(end, first_place(last, size, MOVED, DILATION) + MOVED + to_row)
    return begin, end


@triton.jit
def _in_window(
    exists, own, halo, start, size, CENTRE: tl.constexpr, MOVED: tl.constexpr, DILATION: tl.constexpr
):  # fmt: skip
    """Whether a halo's rows (columns) exist and are in the windows of queries whose windows begin ``own`` rows in."""
    return sees(exists, start + own * DILATION + CENTRE, start + halo * DILATION, size, MOVED, DILATION)


@triton.jit
def attend(
    q, key, value, row, col, lead_y, lead_x, first_y, first_x, height, width, scale, P: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, PAD_Y: tl.constexpr,
    PAD_X: tl.constexpr,
):  # fmt: skip
    """Outputs (M, VALUE_C) and log-sum-exp (M) of a tile of queries ``q`` (M, C).

    Halo row a lies on the image's row first_y + (lead_y + a) · dilation; the tile's queries of row b see halo rows
    b · step to b · step + kh - 1. Likewise the columns.
    """
    M: tl.constexpr = ROWS * COLUMNS
    J: tl.constexpr = BLOCK_Y * BLOCK_X
    factor = tl.abs(scale) * LOG2E
    q = _negated_if(q, scale < 0)
    m = tl.arange(0, M)
    j = tl.arange(0, J)
    own_y = (m // COLUMNS * P.y.step)[:, None]
    own_x = (m % COLUMNS * P.x.step)[:, None]
    terms_y = _row_terms(q, row, PAD_Y, P)
    terms_x = _col_terms(q, col, PAD_X, P)
    begin_y, end_y = _range(lead_y, first_y, height, ROWS, P.y.step, P.y.kernel, P.y.moved, P.y.dilation, P.zero)
    begin_x, end_x = _range(lead_x, first_x, width, COLUMNS, P.x.step, P.x.kernel, P.x.moved, P.x.dilation, P.zero)
    start_y = first_y + lead_y * P.y.dilation
    start_x = first_x + lead_x * P.x.dilation

    largest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    output = tl.full((M, P.value_pad), 0.0, tl.float32)
    for x0 in range(begin_x, end_x, BLOCK_X):
        halo_x = x0 + tl.arange(0, BLOCK_X)[None, :]
        seen_x = _in_window(halo_x < end_x, own_x, halo_x, start_x, width, P.x.centre, P.x.moved, P.x.dilation)
        bias_x = _bias(terms_x, halo_x - own_x, seen_x, factor, P.col_channels > 0, P.x.kernel)
        x = first_x + (lead_x + x0 + j % BLOCK_X) * P.x.dilation
        for y0 in range(begin_y, end_y, BLOCK_Y):
            halo_y = y0 + tl.arange(0, BLOCK_Y)[None, :]
            seen_y = _in_window(halo_y < end_y, own_y, halo_y, start_y, height, P.y.centre, P.y.moved, P.y.dilation)
            bias_y = _bias(terms_y, halo_y - own_y, seen_y, factor, P.row_channels > 0, P.y.kernel)
            y = first_y + (lead_y + y0 + j // BLOCK_X) * P.y.dilation
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            k = load_pixels(key, y, x, inside, P.channels, P.channels_pad, P.key_layout)
            logits = _dot(q, tl.trans(k), None, P) * factor
            logits = tl.reshape(logits, (M, BLOCK_Y, BLOCK_X)) + bias_x[:, None, :] + bias_y[:, :, None]
            logits = tl.reshape(logits, (M, J))
            before = largest
            largest = tl.maximum(before, tl.max(logits, 1))
            base = tl.where(largest == float("-inf"), 0.0, largest)
            weights = tl.exp2(logits - base[:, None])
            shrink = tl.exp2(before - base)
            total = total * shrink + tl.sum(weights, 1)
            v = load_pixels(value, y, x, inside, P.value_channels, P.value_pad, P.value_layout)
            output = _dot(weights.to(v.dtype), v, output * shrink[:, None], P)
    return output / total[:, None], largest * LN2 + tl.log(total)


@triton.jit
def query_gradient(
    q, grad, lse, key, value, row, col, partial, lead_y, lead_x, first_y, first_x, height, width, scale,
    P: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
    PAD_Y: tl.constexpr, PAD_X: tl.constexpr,
):  # fmt: skip
    """Gradient (M, C) and delta (M) of a tile of queries; places as in :func:`attend`.

    The tile's share of the embeddings' gradients goes to ``partial``: a (kh, Dr) matrix, then a (kw, Dc) matrix.
    """
    M: tl.constexpr = ROWS * COLUMNS
    J: tl.constexpr = BLOCK_Y * BLOCK_X
    FIRST: tl.constexpr = P.channels - P.col_channels
    factor = tl.abs(scale) * LOG2E
    q = _negated_if(q, scale < 0)
    m = tl.arange(0, M)
    j = tl.arange(0, J)
    own_y = (m // COLUMNS * P.y.step)[:, None]
    own_x = (m % COLUMNS * P.x.step)[:, None]
    terms_y = _row_terms(q, row, PAD_Y, P)
    terms_x = _col_terms(q, col, PAD_X, P)
    begin_y, end_y = _range(lead_y, first_y, height, ROWS, P.y.step, P.y.kernel, P.y.moved, P.y.dilation, P.zero)
    begin_x, end_x = _range(lead_x, first_x, width, COLUMNS, P.x.step, P.x.kernel, P.x.moved, P.x.dilation, P.zero)
    start_y = first_y + lead_y * P.y.dilation
    start_x = first_x + lead_x * P.x.dilation

    delta = tl.zeros((M,), tl.float32)
    for x0 in range(begin_x, end_x, BLOCK_X):
        halo_x = x0 + tl.arange(0, BLOCK_X)[None, :]
        seen_x = _in_window(halo_x < end_x, own_x, halo_x, start_x, width, P.x.centre, P.x.moved, P.x.dilation)
        bias_x = _bias(terms_x, halo_x - own_x, seen_x, factor, P.col_channels > 0, P.x.kernel) - lse[:, None]
        x = first_x + (lead_x + x0 + j % BLOCK_X) * P.x.dilation
        for y0 in range(begin_y, end_y, BLOCK_Y):
            halo_y = y0 + tl.arange(0, BLOCK_Y)[None, :]
            seen_y = _in_window(halo_y < end_y, own_y, halo_y, start_y, height, P.y.centre, P.y.moved, P.y.dilation)
            bias_y = _bias(terms_y, halo_y - own_y, seen_y, factor, P.row_channels > 0, P.y.kernel)
            y = first_y + (lead_y + y0 + j // BLOCK_X) * P.y.dilation
            _, weights, grad_weights = _weigh(
                q, grad, key, value, y, x, height, width, bias_y, bias_x, factor, P, M, BLOCK_Y, BLOCK_X
            )
            delta += tl.sum(weights * grad_weights, 1)

    grad_q = tl.full((M, P.channels_pad), 0.0, tl.float32)
    by_row = tl.zeros((M, PAD_Y), tl.float32)
    by_col = tl.zeros((M, PAD_X), tl.float32)
    for x0 in range(begin_x, end_x, BLOCK_X):
        halo_x = x0 + tl.arange(0, BLOCK_X)[None, :]
        seen_x = _in_window(halo_x < end_x, own_x, halo_x, start_x, width, P.x.centre, P.x.moved, P.x.dilation)
        bias_x = _bias(terms_x, halo_x - own_x, seen_x, factor, P.col_channels > 0, P.x.kernel) - lse[:, None]
        x = first_x + (lead_x + x0 + j % BLOCK_X) * P.x.dilation
        by_column = tl.zeros((M, BLOCK_X), tl.float32)
        for y0 in range(begin_y, end_y, BLOCK_Y):
            halo_y = y0 + tl.arange(0, BLOCK_Y)[None, :]
            seen_y = _in_window(halo_y < end_y, own_y, halo_y, start_y, height, P.y.centre, P.y.moved, P.y.dilation)
            bias_y = _bias(terms_y, halo_y - own_y, seen_y, factor, P.row_channels > 0, P.y.kernel)
            y = first_y + (lead_y + y0 + j // BLOCK_X) * P.y.dilation
            k, weights, grad_weights = _weigh(
                q, grad, key, value, y, x, height, width, bias_y, bias_x, factor, P, M, BLOCK_Y, BLOCK_X
            )
            grad_logits = weights * (grad_weights - delta[:, None])
            grad_q = _dot(grad_logits.to(k.dtype), k, grad_q, P)
            grad_logits = tl.reshape(grad_logits, (M, BLOCK_Y, BLOCK_X))
            if P.row_channels > 0:
                by_row += _by_tap(tl.sum(grad_logits, 2), own_y - y0, BLOCK_Y, PAD_Y)
            if P.col_channels > 0:
                by_column += tl.sum(grad_logits, 1)
        if P.col_channels > 0:
            by_col += _by_tap(by_column, own_x - x0, BLOCK_X, PAD_X)

    if P.row_channels > 0:
        e = _embedding(row, P.y.kernel, PAD_Y, 0, P.row_channels, P)
        grad_q = tl.dot(by_row, tl.trans(e.to(tl.float32)), grad_q, input_precision=P.sum_precision)
        _store_share(partial, by_row, q, tl.abs(scale), P.y.kernel, PAD_Y, 0, P.row_channels, P)
    if P.col_channels > 0:
        e = _embedding(col, P.x.kernel, PAD_X, FIRST, P.col_channels, P)
        grad_q = tl.dot(by_col, tl.trans(e.to(tl.float32)), grad_q, input_precision=P.sum_precision)
        partial += P.y.kernel * P.row_channels
        _store_share(partial, by_col, q, tl.abs(scale), P.x.kernel, PAD_X, FIRST, P.col_channels, P)
    return grad_q * scale, delta


@triton.jit
def _weigh(
    q, grad, key, value, y, x, height, width, bias_y, bias_x, factor, P: tl.constexpr, M: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """The keys (J, C) of a block at pixels (y, x), and their weights and weights' gradients (M, J)."""
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    k = load_pixels(key, y, x, inside, P.channels, P.channels_pad, P.key_layout)
    v = load_pixels(value, y, x, inside, P.value_channels, P.value_pad, P.value_layout)
    logits = _dot(q, tl.trans(k), None, P) * factor
    logits = tl.reshape(logits, (M, BLOCK_Y, BLOCK_X)) + bias_x[:, None, :] + bias_y[:, :, None]
    weights = tl.exp2(tl.reshape(logits, (M, BLOCK_Y * BLOCK_X)))
    return k, weights, _dot(grad, tl.trans(v), None, P)


@triton.jit
def _by_tap(by_place, own, COUNT: tl.constexpr, PAD: tl.constexpr):
    """What belongs to each tap of a query's window: by_place[m, tap + own[m]] where that is in the block, else 0."""
    place = tl.arange(0, PAD)[None, :] + own
    exists = (place >= 0) & (place < COUNT)
    return tl.where(exists, tl.gather(by_place, tl.where(exists, place, 0), 1), 0.0)


@triton.jit
def _store_share(
    partial, by_tap, q, factor, KERNEL: tl.constexpr, PAD: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """A tile's share of the gradient of an embedding of COUNT channels from FIRST: sum over its queries of
    by_tap[m, t] · q[m].
    """
    share = tl.dot(tl.trans(by_tap), q.to(tl.float32), input_precision=P.sum_precision) * factor
    tap = tl.arange(0, PAD)[:, None]
    channel = tl.arange(0, P.channels_pad)[None, :] - FIRST
    tl.store(partial + tap * COUNT + channel, share, mask=(tap < KERNEL) & (channel >= 0) & (channel < COUNT))


@triton.jit
def key_gradient(
    k, v, query, grad_output, lse_plane, delta_plane, row, col, lead_y, lead_x, phase_y, phase_x, height, width,
    out_height, out_width, scale, P: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr,
):  # fmt: skip
    """Gradients (M, C) of a tile of keys and (M, VALUE_C) of its values, gathered from every query that sees them.

    The tile's row a lies under tap lead_y + a - u · step of query row phase_y + phases · u; likewise the columns.
    """
    M: tl.constexpr = ROWS * COLUMNS
    J: tl.constexpr = BLOCK_Y * BLOCK_X
    factor = tl.abs(scale) * LOG2E
    j = tl.arange(0, J)
    begin_y = tl.maximum(0, lead_y - P.y.kernel + P.y.step) // P.y.step
    begin_x = tl.maximum(0, lead_x - P.x.kernel + P.x.step) // P.x.step
    end_y = tl.minimum((lead_y + ROWS - 1) // P.y.step + 1, (out_height - 1 - phase_y) // P.y.phases + 1)
    end_x = tl.minimum((lead_x + COLUMNS - 1) // P.x.step + 1, (out_width - 1 - phase_x) // P.x.phases + 1)

    y = ((lead_y + tl.arange(0, ROWS)) * P.y.dilation - P.y.before + phase_y * P.y.stride)[None, :]
    x = ((lead_x + tl.arange(0, COLUMNS)) * P.x.dilation - P.x.before + phase_x * P.x.stride)[None, :]
    grad_k = tl.full((M, P.channels_pad), 0.0, tl.float32)
    grad_v = tl.full((M, P.value_pad), 0.0, tl.float32)
    for x0 in range(begin_x, end_x, BLOCK_X):
        u_x = x0 + j % BLOCK_X
        tap_x = lead_x + tl.arange(0, COLUMNS)[None, :] - (u_x * P.x.step)[:, None]
        query_x = phase_x + u_x * P.x.phases
        for y0 in range(begin_y, end_y, BLOCK_Y):
            u_y = y0 + j // BLOCK_X
            tap_y = lead_y + tl.arange(0, ROWS)[None, :] - (u_y * P.y.step)[:, None]
            query_y = phase_y + u_y * P.y.phases
            inside = (query_y < out_height) & (query_x < out_width)
            centre_y = query_y * P.y.stride - P.y.before + P.y.centre
            centre_x = query_x * P.x.stride - P.x.before + P.x.centre
            q = load_pixels(query, centre_y, centre_x, inside, P.channels, P.channels_pad, P.query_layout)
            q = _negated_if(q, scale < 0)
            grad = load_pixels(grad_output, query_y, query_x, inside, P.value_channels, P.value_pad, P.output_layout)
            place = query_y * out_width + query_x
            lse = load_lse(lse_plane + place, inside)
            delta = tl.load(delta_plane + place, mask=inside, other=0.0)
            terms_y = _row_terms(q, row, PAD_Y, P)
            terms_x = _col_terms(q, col, PAD_X, P)
            seen_y = sees(inside[:, None], centre_y[:, None], y, height, P.y.moved, P.y.dilation)
            seen_x = sees(inside[:, None], centre_x[:, None], x, width, P.x.moved, P.x.dilation)
            bias_y = _bias(terms_y, tap_y, seen_y, factor, P.row_channels > 0, P.y.kernel) - lse[:, None]
            bias_x = _bias(terms_x, tap_x, seen_x, factor, P.col_channels > 0, P.x.kernel)
            logits = _dot(q, tl.trans(k), None, P) * factor
            logits = tl.reshape(logits, (J, ROWS, COLUMNS)) + bias_x[:, None, :] + bias_y[:, :, None]
            weights = tl.exp2(tl.reshape(logits, (J, M)))
            grad_weights = _dot(grad, tl.trans(v), None, P)
            grad_logits = weights * (grad_weights - delta[:, None])
            grad_v = _dot(tl.trans(weights.to(grad.dtype)), grad, grad_v, P)
            grad_k = _dot(tl.trans(grad_logits.to(q.dtype)), q, grad_k, P)
    return grad_k * tl.abs(scale), grad_v
