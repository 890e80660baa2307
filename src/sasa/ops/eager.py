"""The fallback: the equation and its gradients in plain PyTorch, chunk by chunk, reusing buffers.

It runs on any device, in any floating dtype, for any window. ``equation.py`` is the specification and what PyTorch
differentiates; this file computes the same numbers in a quarter of the time, where no compiled kernel applies.

Shapes: B batch, N heads, D head width (Dv of the values), H x W image, h x w = H' x W' windows, K = kh·kw taps.
Internally the batch comes last (NDHWB), so that even a shifted view of small images has long contiguous runs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .equation import at_taps
from .window import Axis, Window

# Elements of one chunk's keys. The taps read a chunk kh·kw times, so it should stay in the L2 cache: on the notebook's
# input this is four times as fast as processing the whole batch at once.
CHUNK = 2**19


@torch.no_grad()
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    window: Window,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, N, Dv, h, w) and log-sum-exp of the logits (B, N, h, w)."""
    dtype = sum_dtype(query)
    row, col, table = _cast(dtype, row, col, table)
    outputs, lses = [], []
    for part in _chunks(query):
        q, k, v = _batch_last(dtype, query[part], key[part], value[part])
        logits = _logits(q, k, row, col, table, window, scale)
        outputs.append(_weighted_sum(logits.softmax(1), v, window))
        lses.append(logits.logsumexp(1))
    return _batch_first(query.dtype, outputs), _batch_first(dtype, lses)


@torch.no_grad()
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, row, col and table. The weights are recomputed from the log-sum-exp.

    With p the weights, s the logits and g the gradient of the output:

        dv[p + t] += p_t · g          dp_t = g · v[p + t]          ds_t = p_t · (dp_t - sum_u p_u · dp_u)
        dq += scale · ds_t · (k[p + t] + r_t)      dk[p + t] += scale · ds_t · q      drow, dcol likewise, summed
        dtable_t += ds_t
    """
    dtype = sum_dtype(query)
    row, col, table = _cast(dtype, row, col, table)
    grad_row, grad_col, grad_table = (None if x is None else torch.zeros_like(x) for x in (row, col, table))
    grads_q, grads_k, grads_v = [], [], []
    for part in _chunks(query):
        g, q, k, v = _batch_last(dtype, grad_output[part], query[part], key[part], value[part])
        # An infinite sum comes from an infinite logit, whose softmax is NaN throughout.
        lse_N1hwB = lse[part].masked_fill(lse[part] == float("inf"), float("nan")).movedim(0, -1).unsqueeze(1)
        p_NKhwB = _logits(q, k, row, col, table, window, scale).sub_(lse_N1hwB).exp_()

        dv = _spread(p_NKhwB, g, window)
        dp_NKhwB = _dot_taps(g, v, window)
        ds_NKhwB = dp_NKhwB.sub_((p_NKhwB * dp_NKhwB).sum(1, keepdim=True)).mul_(p_NKhwB)
        ds_NyxhwB = ds_NKhwB.unflatten(1, (window.rows.kernel, window.cols.kernel))
        if grad_table is not None:
            by_col_NyxhB = _by_offset(ds_NyxhwB, 2, 4, window.cols).sum(4)
            grad_table += _by_offset(by_col_NyxhB, 1, 3, window.rows).sum((3, 4))

        ds_NKhwB.mul_(scale)
        q = _at_centres(q, window)
        dk = _spread(ds_NKhwB, q, window)
        dq = _weighted_sum(ds_NKhwB, k, window)
        if row is not None and grad_row is not None:
            _embedding_gradients(row, ds_NyxhwB.sum(2), _first(q, row), _first(dq, row), grad_row, window.rows, 2)
        if col is not None and grad_col is not None:
            _embedding_gradients(col, ds_NyxhwB.sum(1), _last(q, col), _last(dq, col), grad_col, window.cols, 3)

        grad_q = q.new_zeros((*q.shape[:2], window.rows.size, window.cols.size, q.shape[-1]))
        _at_centres(grad_q, window).copy_(dq)
        grads_q.append(grad_q)
        grads_k.append(dk)
        grads_v.append(dv)
    return (
        _batch_first(query.dtype, grads_q),
        _batch_first(query.dtype, grads_k),
        _batch_first(query.dtype, grads_v),
        None if grad_row is None else grad_row.to(query.dtype),
        None if grad_col is None else grad_col.to(query.dtype),
        None if grad_table is None else grad_table.to(query.dtype),
    )


def _embedding_gradients(
    embedding: Tensor, ds_NthwB: Tensor, q: Tensor, dq: Tensor, gradient: Tensor, axis: Axis, pixel: int
) -> None:
    """Adds an embedding's contribution to its channels of the queries' gradient, and to its own gradient; ``pixel`` is
    the dimension of the axis's windows.
    """
    if axis.shifted:  # by taps: a non-finite entry affects only the queries that have its offset
        ds_Ntpm, q_NDpm = (x.movedim(pixel, 2).flatten(3) for x in (ds_NthwB, q))
        taps_NDtp = embedding[..., axis.offsets_of_taps(q.device)]
        part = torch.einsum("ndtp,ntpm->ndpm", taps_NDtp, ds_Ntpm)
        dq.movedim(pixel, 2).add_(part.view_as(dq.movedim(pixel, 2)))
        gradient += _by_offset(torch.einsum("ndpm,ntpm->ndtp", q_NDpm, ds_Ntpm), 2, 3, axis).sum(3)
        return
    dq += (embedding @ ds_NthwB.flatten(2)).view_as(dq)
    gradient += q.flatten(2) @ ds_NthwB.flatten(2).mT


def _logits(
    q: Tensor,
    k: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    window: Window,
    scale: float,
) -> Tensor:
    """Logits of every tap: (N, K, h, w, B). Taps that a ``"mask"`` border hides are -inf."""
    q = _at_centres(q, window) * scale
    logits_NKhwB = _dot_taps(q, k, window)
    logits = logits_NKhwB.unflatten(1, (window.rows.kernel, window.cols.kernel))
    for embedding, channels, axis, pixel, at in (
        (row, _first, window.rows, 2, 2),
        (col, _last, window.cols, 3, 1),
    ):
        if embedding is not None:
            terms_NthwB = (embedding.mT @ channels(q, embedding).flatten(2)).unflatten(2, q.shape[2:])
            logits += _by_tap(terms_NthwB, 1, pixel, axis).unsqueeze(at)
    if table is not None:
        logits += at_taps(table, window).unsqueeze(-1)
    if window.border == "mask":
        inside_yh, inside_xw = window.rows.inside(q.device), window.cols.inside(q.device)
        inside_yxhwB = (inside_yh[:, None, :, None] & inside_xw[None, :, None, :]).unsqueeze(-1)
        logits.masked_fill_(~inside_yxhwB, float("-inf"))
    return logits_NKhwB


def _first(x_NDhwB: Tensor, embedding: Tensor) -> Tensor:
    """The channels that a row embedding belongs to: the first."""
    return x_NDhwB[:, : embedding.shape[1]]


def _last(x_NDhwB: Tensor, embedding: Tensor) -> Tensor:
    """The channels that a column embedding belongs to: the last."""
    return x_NDhwB[:, x_NDhwB.shape[1] - embedding.shape[1] :]


def _by_tap(x: Tensor, offset: int, pixel: int, axis: Axis) -> Tensor:
    """Dimension ``offset``, entries of an embedding, as taps; ``pixel`` is the dimension of the axis's windows."""
    if not axis.shifted:
        return x
    index, shape = _offsets(x, offset, pixel, axis)
    return x.gather(offset, index.expand(shape))


def _by_offset(x: Tensor, tap: int, pixel: int, axis: Axis) -> Tensor:
    """Dimension ``tap`` as entries of an embedding, with zeros where a window has no such tap."""
    if not axis.shifted:
        return x
    index, shape = _offsets(x, tap, pixel, axis)
    entries = x.new_zeros((*shape[:tap], axis.offsets, *shape[tap + 1 :]))
    return entries.scatter_(tap, index.expand(shape), x)


def _offsets(x: Tensor, tap: int, pixel: int, axis: Axis) -> tuple[Tensor, list[int]]:
    """The entries of the taps along these dimensions of ``x``, and the shape of ``x`` by taps."""
    index, shape, sizes = axis.offsets_of_taps(x.device), list(x.shape), [1] * x.dim()
    shape[tap] = axis.kernel
    sizes[tap], sizes[pixel] = index.shape
    return index.view(sizes), shape


def _dot_taps(x_NDhwB: Tensor, image_NDHWB: Tensor, window: Window) -> Tensor:
    """Product x · (image shifted by each tap), summed over the channels: (N, K, h, w, B).

    The products share one buffer: with a new one each time, page faults would take half the time.
    """
    dots = x_NDhwB.new_empty((x_NDhwB.shape[0], window.rows.kernel * window.cols.kernel, *x_NDhwB.shape[2:]))
    product = torch.empty_like(x_NDhwB)
    for index, shifted in enumerate(_under_taps(image_NDHWB, window)):
        torch.mul(x_NDhwB, shifted, out=product)
        torch.sum(product, 1, out=dots[:, index])
    return dots


def _weighted_sum(p_NKhwB: Tensor, v: Tensor, window: Window) -> Tensor:
    """Sum over the taps of p · (values shifted by the tap): (N, Dv, h, w, B)."""
    output = v.new_zeros((*v.shape[:2], *p_NKhwB.shape[2:]))
    for index, shifted in enumerate(_under_taps(v, window)):
        output.addcmul_(p_NKhwB[:, index, None], shifted)
    return output


def _under_taps(x_NDHWB: Tensor, window: Window) -> Iterator[Tensor]:
    """The pixels under each tap, (N, D, h, w, B)."""
    if window.border == "shift":
        columns = window.cols.under_taps(x_NDHWB.device)
        for y in window.rows.under_taps(x_NDHWB.device):
            rows = x_NDHWB.index_select(2, y)
            yield from (rows.index_select(3, column) for column in columns)
        return
    padded = _pad(x_NDHWB, window)
    yield from (padded[:, :, ys, xs] for ys, xs in window.taps)


def _spread(p_NKhwB: Tensor, x_NDhwB: Tensor, window: Window) -> Tensor:
    """Sum of p · x at the pixels under the taps: (N, D, H, W, B)."""
    heads, channels, height, _, batch = x_NDhwB.shape
    rows, cols = window.rows, window.cols
    if window.border != "shift":
        size = rows.before + rows.size + rows.after, cols.before + cols.size + cols.after
        total = x_NDhwB.new_zeros((heads, channels, *size, batch))
        for index, (ys, xs) in enumerate(window.taps):
            total[:, :, ys, xs].addcmul_(p_NKhwB[:, index, None], x_NDhwB)
        return _crop(total, window)
    total = x_NDhwB.new_zeros((heads, channels, rows.size, cols.size, batch))
    columns, index = cols.under_taps(total.device), 0
    for y in rows.under_taps(total.device):
        of_row = x_NDhwB.new_zeros((heads, channels, height, cols.size, batch))
        for column in columns:
            of_row.index_add_(3, column, p_NKhwB[:, index, None] * x_NDhwB)
            index += 1
        total.index_add_(2, y, of_row)
    return total


def _at_centres(x_NDHWB: Tensor, window: Window) -> Tensor:
    """View of the pixels at the window centres: (N, D, h, w, B)."""
    return x_NDHWB[:, :, window.rows.centres, window.cols.centres]


def _pad(x_NDHWB: Tensor, window: Window) -> Tensor:
    rows, cols = window.rows, window.cols
    return F.pad(x_NDHWB, (0, 0, cols.before, cols.after, rows.before, rows.after))


def _crop(padded: Tensor, window: Window) -> Tensor:
    rows, cols = window.rows, window.cols
    return padded[:, :, rows.before : rows.before + rows.size, cols.before : cols.before + cols.size]


def _chunks(x: Tensor) -> Iterator[slice]:
    """Slices of the batch of about CHUNK elements each; one empty slice for an empty batch."""
    size = max(1, CHUNK // max(1, x[:1].numel()))
    for start in range(0, max(1, x.shape[0]), size):
        yield slice(start, start + size)


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype that sums are taken in: float32 for half precision."""
    return torch.promote_types(x.dtype, torch.float32)


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _batch_last(dtype: torch.dtype, *tensors_BNDHW: Tensor) -> list[Tensor]:
    return [tensor.to(dtype).movedim(0, -1).contiguous() for tensor in tensors_BNDHW]


def _batch_first(dtype: torch.dtype, chunks: list[Tensor]) -> Tensor:
    """The chunks, batch last, joined into one contiguous tensor with the batch first."""
    return torch.cat([chunk.movedim(-1, 0).to(dtype) for chunk in chunks]).contiguous()
