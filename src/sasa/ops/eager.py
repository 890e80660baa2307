"""The fallback: the equation and its gradients in plain PyTorch, chunk by chunk and in memory that is used again.

It runs on any device, in any floating dtype, for any window. ``equation.py`` is the specification and what PyTorch
differentiates; this file computes the same numbers where no compiled kernel does, in a quarter of the time.

Shapes: B batch, N heads, D head width (Dv of the values), H x W image, h x w = H' x W' windows, K = kh·kw taps.
Inside, the batch comes last (NDHWB): a shifted view of small images then still has long contiguous runs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .window import Window

# Elements of one chunk's keys. The taps read a chunk kh·kw times over, so it should stay in the second-level cache:
# on the notebook's input this is four times as fast as the whole batch at once.
CHUNK = 2**19


@torch.no_grad()
def forward(
    query: Tensor, key: Tensor, value: Tensor, row: Tensor | None, col: Tensor | None, window: Window, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (B, N, Dv, h, w) and log-sum-exp of the logits (B, N, h, w)."""
    dtype = sum_dtype(query)
    row, col = _cast(dtype, row, col)
    outputs, lses = [], []
    for part in _chunks(query):
        q, k, v = _batch_last(dtype, query[part], key[part], value[part])
        logits = _logits(q, k, row, col, window, scale)
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
    lse: Tensor,
    window: Window,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, row and col. The weights are recomputed from the log-sum-exp.

    With p the weights, s the logits and g the gradient of the output:

        dv[p + t] += p_t · g          dp_t = g · v[p + t]          ds_t = p_t · (dp_t - sum_u p_u · dp_u)
        dq += scale · ds_t · (k[p + t] + r_t)      dk[p + t] += scale · ds_t · q      drow, dcol likewise, summed
    """
    dtype = sum_dtype(query)
    row, col = _cast(dtype, row, col)
    grad_row = None if row is None else torch.zeros_like(row)
    grad_col = None if col is None else torch.zeros_like(col)
    grads_q, grads_k, grads_v = [], [], []
    for part in _chunks(query):
        g, q, k, v = _batch_last(dtype, grad_output[part], query[part], key[part], value[part])
        # An infinite sum comes from an infinite logit, whose softmax is NaN throughout.
        lse_N1hwB = lse[part].masked_fill(lse[part] == float("inf"), float("nan")).movedim(0, -1).unsqueeze(1)
        p_NKhwB = _logits(q, k, row, col, window, scale).sub_(lse_N1hwB).exp_()

        padded_v = _pad(v, window)
        dv = torch.zeros_like(padded_v)
        for index, (ys, xs) in enumerate(window.taps):
            dv[:, :, ys, xs].addcmul_(p_NKhwB[:, index, None], g)
        dp_NKhwB = _dot_taps(g, padded_v, window)
        ds_NKhwB = dp_NKhwB.sub_((p_NKhwB * dp_NKhwB).sum(1, keepdim=True)).mul_(p_NKhwB).mul_(scale)

        padded_k = _pad(k, window)
        dk = torch.zeros_like(padded_k)
        q = _at_centres(q, window)
        dq = torch.zeros_like(q)
        for index, (ys, xs) in enumerate(window.taps):
            dq.addcmul_(ds_NKhwB[:, index, None], padded_k[:, :, ys, xs])
            dk[:, :, ys, xs].addcmul_(ds_NKhwB[:, index, None], q)

        ds_NyxhwB = ds_NKhwB.unflatten(1, (window.rows.kernel, window.cols.kernel))
        if row is not None and grad_row is not None:
            _embedding_gradients(row, ds_NyxhwB.sum(2), _first(q, row), _first(dq, row), grad_row)
        if col is not None and grad_col is not None:
            _embedding_gradients(col, ds_NyxhwB.sum(1), _last(q, col), _last(dq, col), grad_col)

        grad_q = q.new_zeros((*q.shape[:2], window.rows.size, window.cols.size, q.shape[-1]))
        _at_centres(grad_q, window).copy_(dq)
        grads_q.append(grad_q)
        grads_k.append(_crop(dk, window))
        grads_v.append(_crop(dv, window))
    return (
        _batch_first(query.dtype, grads_q),
        _batch_first(query.dtype, grads_k),
        _batch_first(query.dtype, grads_v),
        None if grad_row is None else grad_row.to(query.dtype),
        None if grad_col is None else grad_col.to(query.dtype),
    )


def _embedding_gradients(embedding: Tensor, ds_NthwB: Tensor, q: Tensor, dq: Tensor, gradient: Tensor) -> None:
    """Adds an embedding's part to its channels of the queries' gradient, and to its own."""
    dq += (embedding @ ds_NthwB.flatten(2)).view_as(dq)
    gradient += q.flatten(2) @ ds_NthwB.flatten(2).mT


def _logits(q: Tensor, k: Tensor, row: Tensor | None, col: Tensor | None, window: Window, scale: float) -> Tensor:
    """Logits of every tap: (N, K, h, w, B). Taps that a ``"mask"`` border hides are -inf."""
    q = _at_centres(q, window) * scale
    logits_NKhwB = _dot_taps(q, _pad(k, window), window)
    logits = logits_NKhwB.unflatten(1, (window.rows.kernel, window.cols.kernel))
    for embedding, channels, at in ((row, _first, 2), (col, _last, 1)):
        if embedding is not None:
            terms = embedding.mT @ channels(q, embedding).flatten(2)
            logits += terms.unflatten(2, q.shape[2:]).unsqueeze(at)
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


def _dot_taps(x_NDhwB: Tensor, padded_NDHWB: Tensor, window: Window) -> Tensor:
    """Product x · (padded image shifted by each tap), summed over the channels: (N, K, h, w, B).

    The products share one buffer: fresh memory for each costs page faults, half of the time.
    """
    dots = x_NDhwB.new_empty((x_NDhwB.shape[0], len(window.taps), *x_NDhwB.shape[2:]))
    product = torch.empty_like(x_NDhwB)
    for index, (ys, xs) in enumerate(window.taps):
        torch.mul(x_NDhwB, padded_NDHWB[:, :, ys, xs], out=product)
        torch.sum(product, 1, out=dots[:, index])
    return dots


def _weighted_sum(p_NKhwB: Tensor, v: Tensor, window: Window) -> Tensor:
    """Sum over the taps of p · (values shifted by the tap): (N, Dv, h, w, B)."""
    padded = _pad(v, window)
    output = padded.new_zeros((*v.shape[:2], *p_NKhwB.shape[2:]))
    for index, (ys, xs) in enumerate(window.taps):
        output.addcmul_(p_NKhwB[:, index, None], padded[:, :, ys, xs])
    return output


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
    """The chunks, batch last, joined to one contiguous tensor with the batch first."""
    return torch.cat([chunk.movedim(-1, 0).to(dtype) for chunk in chunks]).contiguous()
