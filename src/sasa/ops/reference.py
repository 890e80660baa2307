"""The equation in plain PyTorch: any device, any floating dtype, any window. Slow, short, and the one to trust.

    y[p] = sum over taps t of  softmax_t( scale · q[p]·(k[p + t] + row[dy] + col[dx]) ) · v[p + t]

It walks over the kh·kw taps of the window and for each takes the *shifted image* as a view, so that it holds kh·kw
logits a pixel but never kh·kw copies of the keys or values. Half precision is computed in float32 and rounded once.

Shapes: B batch, N heads, D head width (Dv of the values), H x W image, h x w = H' x W' windows, K = kh·kw taps.
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


def weights(
    query: Tensor, key: Tensor, row: Tensor | None, col: Tensor | None, window: Window, border: str, scale: float
) -> Tensor:
    """Attention weights (B, N, K, h, w), summing to 1 over K; differentiable to any order."""
    q, k, row, col = _cast(_sum_dtype(query), query, key, row, col)
    return _logits(q, k, row, col, window, border, scale).softmax(2).to(query.dtype)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    window: Window,
    border: str,
    scale: float,
) -> Tensor:
    """Output (B, N, Dv, h, w); differentiable to any order by PyTorch's own autograd."""
    q, k, v, row, col = _cast(_sum_dtype(query), query, key, value, row, col)
    return _weighted_sum(_logits(q, k, row, col, window, border, scale).softmax(2), v, window).to(query.dtype)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    window: Window,
    border: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, N, Dv, h, w) and log-sum-exp of the logits (B, N, h, w), outside of autograd, chunk by chunk."""
    dtype = _sum_dtype(query)
    outputs, lses = [], []
    for part in _chunks(query):
        q, k, v, row_, col_ = _cast(dtype, query[part], key[part], value[part], row, col)
        logits = _logits(q, k, row_, col_, window, border, scale)
        outputs.append(_weighted_sum(logits.softmax(2), v, window).to(query.dtype))
        lses.append(logits.logsumexp(2))
    return torch.cat(outputs), torch.cat(lses)


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    lse: Tensor,
    window: Window,
    border: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, row and col. The weights are recomputed from the log-sum-exp.

    With p the weights, s the logits and g the gradient of the output:

        dv[p + t] += p_t · g          dp_t = g · v[p + t]          ds_t = p_t · (dp_t - sum_u p_u · dp_u)
        dq += scale · ds_t · (k[p + t] + row + col)      dk[p + t] += scale · ds_t · q      drow, dcol likewise, summed
    """
    dtype = _sum_dtype(query)
    row_, col_ = _cast(dtype, row, col)
    grad_row = None if row_ is None else torch.zeros_like(row_)
    grad_col = None if col_ is None else torch.zeros_like(col_)
    grads_q, grads_k, grads_v = [], [], []
    for part in _chunks(query):
        g, q, k, v = _cast(dtype, grad_output[part], query[part], key[part], value[part])
        p_BNKhw = _logits(q, k, row_, col_, window, border, scale).sub_(lse[part].unsqueeze(2)).exp_()

        padded_v = F.pad(v, window.padding)
        dv = torch.zeros_like(padded_v)
        for index, (ys, xs) in enumerate(window.taps):
            dv[..., ys, xs].addcmul_(p_BNKhw[:, :, index, None], g)
        dp_BNKhw = _dot_taps(g, padded_v, window)
        ds_BNKhw = p_BNKhw * (dp_BNKhw - (p_BNKhw * dp_BNKhw).sum(2, keepdim=True)) * scale

        padded_k = F.pad(k, window.padding)
        dk = torch.zeros_like(padded_k)
        centre_q = q[..., window.rows.centres, window.cols.centres]
        dq = torch.zeros_like(q)
        centre_dq = dq[..., window.rows.centres, window.cols.centres]
        for index, (ys, xs) in enumerate(window.taps):
            centre_dq.addcmul_(ds_BNKhw[:, :, index, None], padded_k[..., ys, xs])
            dk[..., ys, xs].addcmul_(ds_BNKhw[:, :, index, None], centre_q)

        ds_BNyxhw = ds_BNKhw.unflatten(2, (window.rows.kernel, window.cols.kernel))
        for embedding, grad, ds in ((row_, grad_row, ds_BNyxhw.sum(3)), (col_, grad_col, ds_BNyxhw.sum(2))):
            if embedding is not None and grad is not None:
                centre_dq += torch.einsum("bnthw,ndt->bndhw", ds, embedding)
                grad += torch.einsum("bnthw,bndhw->ndt", ds, centre_q)

        grads_q.append(dq.to(query.dtype))
        grads_k.append(_crop(dk, window).to(query.dtype))
        grads_v.append(_crop(dv, window).to(query.dtype))
    return (
        torch.cat(grads_q),
        torch.cat(grads_k),
        torch.cat(grads_v),
        None if grad_row is None else grad_row.to(query.dtype),
        None if grad_col is None else grad_col.to(query.dtype),
    )


def _logits(
    q: Tensor, k: Tensor, row: Tensor | None, col: Tensor | None, window: Window, border: str, scale: float
) -> Tensor:
    """Scale · q·(k + row + col) for every tap: (B, N, K, h, w). Taps that a ``"mask"`` border hides are -inf."""
    q = q[..., window.rows.centres, window.cols.centres] * scale
    logits = _dot_taps(q, F.pad(k, window.padding), window).unflatten(2, (window.rows.kernel, window.cols.kernel))
    if row is not None:
        logits = logits + torch.einsum("bndhw,ndy->bnyhw", q, row).unsqueeze(3)
    if col is not None:
        logits = logits + torch.einsum("bndhw,ndx->bnxhw", q, col).unsqueeze(2)
    if border == "mask":
        inside_yh, inside_xw = window.rows.inside(q.device), window.cols.inside(q.device)
        inside_yxhw = inside_yh[:, None, :, None] & inside_xw[None, :, None, :]
        logits = logits.masked_fill(~inside_yxhw, float("-inf"))
    return logits.flatten(2, 3)


def _dot_taps(x_BNDhw: Tensor, padded_BNDHW: Tensor, window: Window) -> Tensor:
    """X · (padded image shifted by each tap), summed over the channels: (B, N, K, h, w)."""
    return torch.stack([(x_BNDhw * padded_BNDHW[..., ys, xs]).sum(2) for ys, xs in window.taps], dim=2)


def _weighted_sum(p_BNKhw: Tensor, v: Tensor, window: Window) -> Tensor:
    padded = F.pad(v, window.padding)
    output = padded.new_zeros((*v.shape[:3], window.rows.outputs, window.cols.outputs))
    for index, (ys, xs) in enumerate(window.taps):
        output.addcmul_(p_BNKhw[:, :, index, None], padded[..., ys, xs])
    return output


def _crop(padded: Tensor, window: Window) -> Tensor:
    rows, cols = window.rows, window.cols
    return padded[..., rows.before : rows.before + rows.size, cols.before : cols.before + cols.size]


def _chunks(x: Tensor) -> Iterator[slice]:
    """Slices of the batch of about CHUNK elements each; one empty slice for an empty batch."""
    size = max(1, CHUNK // max(1, x[:1].numel()))
    for start in range(0, max(1, x.shape[0]), size):
        yield slice(start, start + size)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]
