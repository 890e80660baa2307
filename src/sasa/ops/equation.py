"""The equation, in plain ATen operations: the specification of everything else.

    logit_t = scale · q[p]·( k[p + t] + r_t )          for every tap t = (dy, dx) of the window around pixel p
    y[p]    = sum over t of  softmax_t(logit) · v[p + t]

r_t is row[dy] on the first Dr channels of a head plus col[dx] on its last Dc. PyTorch differentiates it to any order,
in reverse and forward mode. For each of the K = kh·kw taps it takes the shifted image as a view: K logits a pixel
exist, never K copies of keys or values. Half precision is computed in float32 and rounded once.

Shapes: query and key (B, N, D, H, W), value (B, N, Dv, H, W), row (N, Dr, kh), col (N, Dc, kw); h x w = H' x W'.
Source: Ramachandran et al. 2019 (arXiv 1906.05909), section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .window import Window


def attention(
    query: Tensor, key: Tensor, value: Tensor, row: Tensor | None, col: Tensor | None, window: Window, scale: float
) -> Tensor:
    """Output y, (B, N, Dv, h, w)."""
    p_BNKhw = logits(query, key, row, col, window, scale).softmax(2)
    v = pad(value.to(p_BNKhw.dtype), window)
    y = torch.zeros((), dtype=v.dtype, device=v.device)
    for t, (ys, xs) in enumerate(window.taps):
        y = y + p_BNKhw[:, :, t, None] * v[..., ys, xs]
    return y.to(query.dtype)


def weights(query: Tensor, key: Tensor, row: Tensor | None, col: Tensor | None, window: Window, scale: float) -> Tensor:
    """Attention weights softmax_t(logit), (B, N, K, h, w)."""
    return logits(query, key, row, col, window, scale).softmax(2).to(query.dtype)


def logits(query: Tensor, key: Tensor, row: Tensor | None, col: Tensor | None, window: Window, scale: float) -> Tensor:
    """Logits (B, N, K, h, w), at least in float32. Taps that a ``"mask"`` border hides are -inf."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k = query.to(dtype), pad(key.to(dtype), window)
    q = q[..., window.rows.centres, window.cols.centres] * scale
    s = torch.stack([(q * k[..., ys, xs]).sum(2) for ys, xs in window.taps], 2)
    s_BNyxhw = s.unflatten(2, (window.rows.kernel, window.cols.kernel))
    if row is not None:
        s_BNyxhw = s_BNyxhw + torch.einsum("bndhw,ndy->bnyhw", q[:, :, : row.shape[1]], row.to(dtype)).unsqueeze(3)
    if col is not None:
        last = q[:, :, q.shape[2] - col.shape[1] :]
        s_BNyxhw = s_BNyxhw + torch.einsum("bndhw,ndx->bnxhw", last, col.to(dtype)).unsqueeze(2)
    if window.border == "mask":
        inside_yh, inside_xw = window.rows.inside(q.device), window.cols.inside(q.device)
        inside = inside_yh[:, None, :, None] & inside_xw[:, None, :]
        s_BNyxhw = s_BNyxhw.masked_fill(~inside, float("-inf"))
    return s_BNyxhw.flatten(2, 3)


def pad(x: Tensor, window: Window) -> Tensor:
    """The image with zeros around it, so that every window has all of its taps."""
    rows, cols = window.rows, window.cols
    return F.pad(x, (cols.before, cols.after, rows.before, rows.after))
