"""The equation, in plain ATen operations: the specification of everything else.

    logit_t = scale · q[p]·( k[p + t] + r_t ) + b_t    for every tap t = (dy, dx) of the window around pixel p
    y[p]    = sum over t of  softmax_t(logit) · v[p + t]

r_t is row[dy] on the first Dr channels of a head plus col[dx] on its last Dc, b_t is table[dy, dx]. PyTorch
differentiates it to any order, in reverse and forward mode. For each of the K = kh·kw taps the shifted image is a view:
there are K logits per pixel but never K copies of keys or values, except with the border ``"shift"``, whose images are
gathered. Half precision is computed in float32 and rounded once.

Shapes: query and key (B, N, D, H, W), value (B, N, Dv, H, W), row (N, Dr, kh), col (N, Dc, kw), table (N, kh, kw);
h x w = H' x W'. With the border ``"shift"`` row, col and table have 2kh - 1 and 2kw - 1 entries, one for each offset.
Source: Ramachandran et al. 2019 (arXiv 1906.05909), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .window import Axis, Window


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    window: Window,
    scale: float,
) -> Tensor:
    """Output y, (B, N, Dv, h, w)."""
    p_BNKhw = logits(query, key, row, col, table, window, scale).softmax(2)
    y = torch.zeros((), dtype=p_BNKhw.dtype, device=value.device)
    for t, v_t in enumerate(under_taps(value.to(p_BNKhw.dtype), window)):
        y = y + p_BNKhw[:, :, t, None] * v_t
    return y.to(query.dtype)


def weights(
    query: Tensor,
    key: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    window: Window,
    scale: float,
) -> Tensor:
    """Attention weights softmax_t(logit), (B, N, K, h, w)."""
    return logits(query, key, row, col, table, window, scale).softmax(2).to(query.dtype)


def logits(
    query: Tensor,
    key: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    window: Window,
    scale: float,
) -> Tensor:
    """Logits (B, N, K, h, w), at least in float32. Taps that a ``"mask"`` border hides are -inf."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query.to(dtype)[..., window.rows.centres, window.cols.centres] * scale
    s = torch.stack([(q * k_t).sum(2) for k_t in under_taps(key.to(dtype), window)], 2)
    s_BNyxhw = s.unflatten(2, (window.rows.kernel, window.cols.kernel))
    if row is not None:
        row, of_row = _at_offsets(row.to(dtype), window.rows), "ndyh" if window.rows.shifted else "ndy"
        s_BNyxhw = s_BNyxhw + torch.einsum(f"bndhw,{of_row}->bnyhw", q[:, :, : row.shape[1]], row).unsqueeze(3)
    if col is not None:
        col, of_col = _at_offsets(col.to(dtype), window.cols), "ndxw" if window.cols.shifted else "ndx"
        last = q[:, :, q.shape[2] - col.shape[1] :]
        s_BNyxhw = s_BNyxhw + torch.einsum(f"bndhw,{of_col}->bnxhw", last, col).unsqueeze(2)
    if table is not None:
        s_BNyxhw = s_BNyxhw + at_taps(table.to(dtype), window)
    if window.border == "mask":
        inside_yh, inside_xw = window.rows.inside(q.device), window.cols.inside(q.device)
        inside = inside_yh[:, None, :, None] & inside_xw[:, None, :]
        s_BNyxhw = s_BNyxhw.masked_fill(~inside, float("-inf"))
    return s_BNyxhw.flatten(2, 3)


def under_taps(x: Tensor, window: Window) -> Iterator[Tensor]:
    """For each tap, row by row, the pixels (..., h, w) under it: zeros beyond the image."""
    if window.border == "shift":
        columns = window.cols.under_taps(x.device)
        for y in window.rows.under_taps(x.device):
            rows = x.index_select(-2, y)
            yield from (rows.index_select(-1, column) for column in columns)
        return
    padded = pad(x, window)
    for ys, xs in window.taps:
        yield padded[..., ys, xs]


def at_taps(table: Tensor, window: Window) -> Tensor:
    """(N, kh, kw, h, w), or 1 for h and w: what a table adds to the logits of the taps."""
    if window.border != "shift":
        return table[..., None, None]
    return _at_offsets(_at_offsets(table, window.cols).movedim(1, -1), window.rows).movedim((1, 2, 3), (2, 4, 1))


def _at_offsets(embedding: Tensor, axis: Axis) -> Tensor:
    """The last dimension, offsets, as taps and windows if windows are moved."""
    return embedding[..., axis.offsets_of_taps(embedding.device)] if axis.shifted else embedding


def pad(x: Tensor, window: Window) -> Tensor:
    """The image with zeros around it, so that every window has all of its taps."""
    rows, cols = window.rows, window.cols
    return F.pad(x, (cols.before, cols.after, rows.before, rows.after))
