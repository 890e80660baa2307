"""The attention stem's kernels: attention inside blocks of an image, for a slice of a head's channels.

A thread computes one block at a time, so nothing is exchanged between threads. Its pixels, values and logits are
tensors with one number for each of the program's blocks, in tuples: pixel k's channel c is number k·C + c. Products are
multiply-adds in float32, since a head's few channels would fill at most half of a tensor core's operand.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
_SIZES = ["height", "width", "rows", "columns", "blocks", "groups", "outputs"]
_STRIDES = ["x_batch", "x_channel", "x_row", "x_column"]


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def forward(
    x, x_batch: tl.int64, x_channel: tl.int64, x_row: tl.int64, x_column: tl.int64, form, values, sign,
    pivot, extreme, moments, height, width, rows, columns, blocks, groups, outputs,
    S: tl.constexpr, C: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, BLOCKS: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Write the extremes, and each program's share of the moments: the sums of the outputs' differences from ``pivot``,
    a number near their mean, and of the squares.
    """
    part, first = tl.program_id(0), tl.program_id(1) * D  # the first channel of the slice
    signs, pivots = _numbers(sign + first, D), _numbers(pivot + first, D)
    sums, squares = _zeros(BLOCKS, D), _zeros(BLOCKS, D)
    for group in range(part * groups, min(part * groups + groups, tl.cdiv(blocks, BLOCKS))):
        block, exists, image, below, right = _corners(
            x, x_batch, x_row, x_column, group, height, width, rows, columns, blocks, S, BLOCKS
        )
        pixels = _pixels(image, x_channel, x_row, x_column, exists, below, right, S, C, CUT)
        v = _values(values + first * C, outputs, pixels, S, C, D)
        most = ()
        for o in tl.static_range(D):  # noqa: B007  (Triton takes _ for a variable that the loop below carries)
            most = most + (tl.full((BLOCKS,), float("-inf"), tl.float32),)
        for p in range(S * S):
            inside = _inside(exists, below, right, p, S, CUT)
            _, t = _query(image, x_channel, x_row, x_column, p, inside, form, first // HEAD, S, C)
            weights, share = _weights(t, pixels, below, right, S, C, CUT)
            y = _attend(weights, share, v, S, D)
            order = _order(y, p, inside, signs, D, CUT)
            new, first_moments, second_moments = (), (), ()
            for o in tl.static_range(D):
                new = new + (tl.maximum(most[o], order[o], propagate_nan=tl.PropagateNan.ALL),)
                away = tl.where(inside, y[o] - pivots[o], 0.0)
                first_moments = first_moments + (sums[o] + away,)
                second_moments = second_moments + (squares[o] + away * away,)
            most, sums, squares = new, first_moments, second_moments
        for o in tl.static_range(D):
            found = most[o] * tl.where(signs[o] == 0, 1.0, signs[o])
            tl.store(extreme + block.to(tl.int64) * outputs + first + o, found, mask=exists)
    for o in tl.static_range(D):
        tl.store(moments + (part * outputs + first + o) * 2, tl.sum(sums[o], 0))
        tl.store(moments + (part * outputs + first + o) * 2 + 1, tl.sum(squares[o], 0))


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def backward(
    x, x_batch: tl.int64, x_channel: tl.int64, x_row: tl.int64, x_column: tl.int64, form, values, sign,
    grad, slope, offset, mean, grad_form, grad_values, grad_x, height, width, rows, columns, blocks, groups, outputs,
    S: tl.constexpr, C: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, BLOCKS: tl.constexpr, CUT: tl.constexpr,
    NEEDS_X: tl.constexpr,
):  # fmt: skip
    """Write each program's share of the gradients of form and values, and each slice's share of that of the image:
    (slices, B, C, height, width), contiguous.
    """
    part, first = tl.program_id(0), tl.program_id(1) * D
    signs, slopes = _numbers(sign + first, D), _numbers(slope + first, D)
    offsets, means = _numbers(offset + first, D), _numbers(mean + first, D)
    of_form, of_values = _zeros(BLOCKS, C * C), _zeros(BLOCKS, S * S * D * C)
    for group in range(part * groups, min(part * groups + groups, tl.cdiv(blocks, BLOCKS))):
        block, exists, image, below, right = _corners(
            x, x_batch, x_row, x_column, group, height, width, rows, columns, blocks, S, BLOCKS
        )
        pixels = _pixels(image, x_channel, x_row, x_column, exists, below, right, S, C, CUT)
        v = _values(values + first * C, outputs, pixels, S, C, D)

        most, place, of_extreme = (), (), ()
        for o in tl.static_range(D):
            most = most + (tl.full((BLOCKS,), float("-inf"), tl.float32),)
            place = place + (tl.zeros((BLOCKS,), tl.int32),)
            loaded = tl.load(grad + block.to(tl.int64) * outputs + first + o, mask=exists, other=0.0)
            of_extreme = of_extreme + (loaded.to(tl.float32),)
        for p in range(S * S):
            inside = _inside(exists, below, right, p, S, CUT)
            query, t = _query(image, x_channel, x_row, x_column, p, inside, form, first // HEAD, S, C)
            weights, share = _weights(t, pixels, below, right, S, C, CUT)
            order = _order(_attend(weights, share, v, S, D), p, inside, signs, D, CUT)
            most, place = _extremes(most, place, order, p, D)

        of_v, of_pixels = _zeros(BLOCKS, S * S * D), _zeros(BLOCKS, S * S * C)
        for p in range(S * S):
            inside = _inside(exists, below, right, p, S, CUT)
            query, t = _query(image, x_channel, x_row, x_column, p, inside, form, first // HEAD, S, C)
            weights, share = _weights(t, pixels, below, right, S, C, CUT)
            share = tl.where(inside, share, 0.0)
            y = _attend(weights, share, v, S, D)
            of_y, along = (), 0.0  # both times the share: the weights are not normalised
            for o in tl.static_range(D):
                g = offsets[o] + slopes[o] * (y[o] - means[o]) + tl.where(place[o] == p, of_extreme[o], 0.0)
                of_y = of_y + (g * share,)
                along += g * share * y[o]
            of_logits, new = (), ()
            for k in tl.static_range(S * S):
                of_weight = 0.0
                for o in tl.static_range(D):
                    of_weight += of_y[o] * v[k * D + o]
                    new = new + (of_v[k * D + o] + weights[k] * of_y[o],)
                of_logits = of_logits + (weights[k] * (of_weight - along),)
            of_v = new
            of_t = _of_query(of_logits, pixels, S, C)
            new = ()
            for e in tl.static_range(C):
                for c in tl.static_range(C):
                    new = new + (of_form[e * C + c] + query[e] * of_t[c],)
            of_form = new
            if NEEDS_X:
                of_pixels = _of_pixels(of_pixels, of_logits, t, of_t, p, form, first // HEAD, S, C)
        new = ()
        for k in tl.static_range(S * S):
            for o in tl.static_range(D):
                for c in tl.static_range(C):
                    new = new + (of_values[(k * D + o) * C + c] + of_v[k * D + o] * pixels[k * C + c],)
        of_values = new
        if NEEDS_X:
            of_pixels = _add_values(of_pixels, of_v, values + first * C, outputs, S, C, D)
            _store_pixels(grad_x, of_pixels, exists, below, right, block, height, width, rows, columns, blocks, S, C)

    number = (part * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    for i in tl.static_range(C * C):
        tl.store(grad_form + number * C * C + i, tl.sum(of_form[i], 0))
    for i in tl.static_range(S * S * D * C):
        tl.store(grad_values + number * S * S * D * C + i, tl.sum(of_values[i], 0))


@triton.jit
def _numbers(pointer, COUNT: tl.constexpr):
    """COUNT numbers, the same for every block."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.load(pointer + i).to(tl.float32),)
    return found


@triton.jit
def _zeros(BLOCKS: tl.constexpr, COUNT: tl.constexpr):
    """COUNT zeros for each block."""
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (tl.zeros((BLOCKS,), tl.float32),)
    return found


@triton.jit
def _corners(
    x, x_batch, x_row, x_column, group, height, width, rows, columns, blocks, S: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """A group's blocks, whether they exist, the addresses of their first pixels, and the rows and columns from there to
    the edges of the image.
    """
    block = group * BLOCKS + tl.arange(0, BLOCKS)
    batch, row, column = block // (rows * columns), block // columns % rows, block % columns
    image = x + batch.to(tl.int64) * x_batch + row.to(tl.int64) * S * x_row + column.to(tl.int64) * S * x_column
    return block, block < blocks, image, height - row * S, width - column * S


@triton.jit
def _inside(exists, below, right, p, S: tl.constexpr, CUT: tl.constexpr):
    """Whether pixel p of each block exists."""
    if CUT:
        return exists & (p // S < below) & (p % S < right)
    return exists


@triton.jit
def _pixels(
    image, x_channel, x_row, x_column, exists, below, right, S: tl.constexpr, C: tl.constexpr, CUT: tl.constexpr
):
    """All pixels of each block, channel by channel."""
    found = ()
    for k in tl.static_range(S * S):
        inside = _inside(exists, below, right, k, S, CUT)
        for c in tl.static_range(C):
            place = image + (k // S * x_row + k % S * x_column + c * x_channel)
            found = found + (tl.load(place, mask=inside, other=0.0).to(tl.float32),)
    return found


@triton.jit
def _values(values, outputs, pixels, S: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Each pixel's value, V_k x_k."""
    found = ()
    for k in tl.static_range(S * S):
        for o in tl.static_range(D):
            value = tl.load(values + (k * outputs + o) * C) * pixels[k * C]
            for c in tl.static_range(1, C):
                value += tl.load(values + (k * outputs + o) * C + c) * pixels[k * C + c]
            found = found + (value,)
    return found


@triton.jit
def _query(image, x_channel, x_row, x_column, p, inside, form, head, S: tl.constexpr, C: tl.constexpr):
    """Pixel p of each block, and x_p^T F, which multiplied by a pixel is the logit."""
    place = image + (p // S * x_row + p % S * x_column)
    query, products = (), ()
    for e in tl.static_range(C):
        query = query + (tl.load(place + e * x_channel, mask=inside, other=0.0).to(tl.float32),)
    for c in tl.static_range(C):
        product = query[0] * tl.load(form + head * C * C + c)
        for e in tl.static_range(1, C):
            product += query[e] * tl.load(form + (head * C + e) * C + c)
        products = products + (product,)
    return query, products


@triton.jit
def _weights(t, pixels, below, right, S: tl.constexpr, C: tl.constexpr, CUT: tl.constexpr):
    """The softmax of one query in each block, before it is multiplied by a share; and that."""
    logits = ()
    for k in tl.static_range(S * S):
        logit = t[0] * pixels[k * C]
        for c in tl.static_range(1, C):
            logit += t[c] * pixels[k * C + c]
        if CUT:
            logit = tl.where((k // S < below) & (k % S < right), logit, float("-inf"))
        logits = logits + (logit,)
    most = logits[0]
    for k in tl.static_range(1, S * S):
        most = tl.maximum(most, logits[k])
    weights = (tl.exp2((logits[0] - most) * LOG2_E),)
    total = weights[0]
    for k in tl.static_range(1, S * S):
        weights = weights + (tl.exp2((logits[k] - most) * LOG2_E),)
        total += weights[k]
    return weights, 1 / total


@triton.jit
def _attend(weights, share, v, S: tl.constexpr, D: tl.constexpr):
    """The weighted sums of the values."""
    y = ()
    for o in tl.static_range(D):
        total = weights[0] * v[o]
        for k in tl.static_range(1, S * S):
            total += weights[k] * v[k * D + o]
        y = y + (total * share,)
    return y


@triton.jit
def _order(y, p, inside, signs, D: tl.constexpr, CUT: tl.constexpr):
    """Numbers of which the largest is the extreme: y times its sign; with a sign of 0, that of the first pixel."""
    found = ()
    for o in tl.static_range(D):
        order = y[o] * tl.where(signs[o] == 0, 1.0, signs[o])
        order = tl.where((signs[o] == 0) & (p > 0), float("-inf"), order)
        if CUT:
            order = tl.where(inside, order, float("-inf"))
        found = found + (order,)
    return found


@triton.jit
def _extremes(most, place, order, p, D: tl.constexpr):
    """The largest of the first p + 1 pixels and where it is; NaN is the largest, as for a max pool."""
    new, where = (), ()
    for o in tl.static_range(D):
        better = (order[o] > most[o]) | ((order[o] != order[o]) & (most[o] == most[o]))
        new = new + (tl.where(better, order[o], most[o]),)
        where = where + (tl.where(better, p, place[o]),)
    return new, where


@triton.jit
def _of_query(of_logits, pixels, S: tl.constexpr, C: tl.constexpr):
    """The gradient of x_p^T F."""
    found = ()
    for c in tl.static_range(C):
        total = of_logits[0] * pixels[c]
        for k in tl.static_range(1, S * S):
            total += of_logits[k] * pixels[k * C + c]
        found = found + (total,)
    return found


@triton.jit
def _of_pixels(of_pixels, of_logits, t, of_t, p, form, head, S: tl.constexpr, C: tl.constexpr):
    """The gradients of the pixels with what they contribute as keys, and pixel p as a query."""
    found = ()
    for k in tl.static_range(S * S):
        for e in tl.static_range(C):
            as_query = of_t[0] * tl.load(form + (head * C + e) * C)
            for c in tl.static_range(1, C):
                as_query += of_t[c] * tl.load(form + (head * C + e) * C + c)
            as_key = of_logits[k] * t[e]
            found = found + (of_pixels[k * C + e] + as_key + tl.where(p == k, as_query, 0.0),)
    return found


@triton.jit
def _add_values(of_pixels, of_v, values, outputs, S: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """The gradients of the pixels with what they contribute as values."""
    found = ()
    for k in tl.static_range(S * S):
        for c in tl.static_range(C):
            total = of_pixels[k * C + c]
            for o in tl.static_range(D):
                total += tl.load(values + (k * outputs + o) * C + c) * of_v[k * D + o]
            found = found + (total,)
    return found


@triton.jit
def _store_pixels(
    grad_x, of_pixels, exists, below, right, block, height, width, rows, columns, blocks,
    S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Write the slice's share of the gradient of the image."""
    batch, row, column = block // (rows * columns), block // columns % rows, block % columns
    plane = tl.program_id(1).to(tl.int64) * (blocks // (rows * columns)) + batch
    place = grad_x + plane * C * height * width + row * S * width + column * S
    for k in tl.static_range(S * S):
        inside = _inside(exists, below, right, k, S, True)
        for c in tl.static_range(C):
            tl.store(place + (c * height + k // S) * width + k % S, of_pixels[k * C + c], mask=inside)
