"""The equation in plain PyTorch: any device, any floating dtype, any window. Slow, short, and the one to trust.

    y[p] = sum over taps t of  softmax_t( scale · q[p]·(k[p + t] + row[dy] + col[dx]) ) · v[p + t]

It walks over the kh·kw taps of the window and for each takes the *shifted image* as a view, so that it holds kh·kw
logits a pixel but never kh·kw copies of the keys or values. Half precision is computed in float32 and rounded once.

Shapes: B batch, N heads, D head width (Dv of the values), H x W image, h x w = H' x W' windows, K = kh·kw taps.
Inside, the batch comes last (NDHWB): a shifted view of small images then still has long contiguous runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

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
    dtype = _sum_dtype(query)
    q, k = _batch_last(dtype, query, key)
    row, col = _cast(dtype, row, col)
    p_NKhwB = _logits(q, k, row, col, window, border, scale, _dot_taps).softmax(1)
    return p_NKhwB.movedim(-1, 0).to(query.dtype).contiguous()


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
    dtype = _sum_dtype(query)
    q, k, v = _batch_last(dtype, query, key, value)
    row, col = _cast(dtype, row, col)
    p_NKhwB = _logits(q, k, row, col, window, border, scale, _dot_taps).softmax(1)
    return _weighted_sum(p_NKhwB, v, window).movedim(-1, 0).to(query.dtype)


@torch.no_grad()
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
    row, col = _cast(dtype, row, col)
    outputs, lses = [], []
    for part in _chunks(query):
        q, k, v = _batch_last(dtype, query[part], key[part], value[part])
        logits = _logits(q, k, row, col, window, border, scale, _dot_taps_reusing_memory)
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
    output: Tensor | None,
    lse: Tensor,
    window: Window,
    border: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, row and col. The weights are recomputed from the log-sum-exp; the
    output is not needed.

    With p the weights, s the logits and g the gradient of the output:

        dv[p + t] += p_t · g          dp_t = g · v[p + t]          ds_t = p_t · (dp_t - sum_u p_u · dp_u)
        dq += scale · ds_t · (k[p + t] + row + col)      dk[p + t] += scale · ds_t · q      drow, dcol likewise, summed
    """
    dtype = _sum_dtype(query)
    row, col = _cast(dtype, row, col)
    grad_row = None if row is None else torch.zeros_like(row)
    grad_col = None if col is None else torch.zeros_like(col)
    grads_q, grads_k, grads_v = [], [], []
    for part in _chunks(query):
        g, q, k, v = _batch_last(dtype, grad_output[part], query[part], key[part], value[part])
        # An infinite sum comes from an infinite logit, whose softmax is NaN throughout.
        lse_N1hwB = lse[part].masked_fill(lse[part] == float("inf"), float("nan")).movedim(0, -1).unsqueeze(1)
        logits = _logits(q, k, row, col, window, border, scale, _dot_taps_reusing_memory)
        p_NKhwB = logits.sub_(lse_N1hwB).exp_()

        padded_v = _pad(v, window)
        dv = torch.zeros_like(padded_v)
        for index, (ys, xs) in enumerate(window.taps):
            dv[:, :, ys, xs].addcmul_(p_NKhwB[:, index, None], g)
        dp_NKhwB = _dot_taps_reusing_memory(g, padded_v, window)
        ds_NKhwB = dp_NKhwB.sub_((p_NKhwB * dp_NKhwB).sum(1, keepdim=True)).mul_(p_NKhwB).mul_(scale)

        padded_k = _pad(k, window)
        dk = torch.zeros_like(padded_k)
        q = _at_centres(q, window)
        dq = torch.zeros_like(q)
        for index, (ys, xs) in enumerate(window.taps):
            dq.addcmul_(ds_NKhwB[:, index, None], padded_k[:, :, ys, xs])
            dk[:, :, ys, xs].addcmul_(ds_NKhwB[:, index, None], q)

        ds_NyxhwB = ds_NKhwB.unflatten(1, (window.rows.kernel, window.cols.kernel))
        for embedding, grad, ds_NthwB in ((row, grad_row, ds_NyxhwB.sum(2)), (col, grad_col, ds_NyxhwB.sum(1))):
            if embedding is not None and grad is not None:
                dq += (embedding @ ds_NthwB.flatten(2)).view_as(q)
                grad += q.flatten(2) @ ds_NthwB.flatten(2).mT

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


def second_derivatives(
    saved: Sequence[Tensor | None], grad_grads: Sequence[Tensor | None], function: Callable[..., Tensor]
) -> list[Tensor | None]:
    """Derivatives of a backward: autograd, which knows the reference to any order, differentiates its gradients.

    Args:
        saved: the gradient of the output, then the arguments of ``function``; None for missing ones.
        grad_grads: the gradients of the arguments' gradients.
        function: the forward in terms of this module.

    Returns:
        A derivative for each of ``saved``.
    """
    create_graph = torch.is_grad_enabled()
    present = [x for x in saved if x is not None]
    with torch.enable_grad(), without_autocast(present[0]):
        # Views, so that a tensor passed twice (say as query and key) still counts as two arguments.
        views: list = [x if x is None else x.view_as(x) if x.requires_grad else x.detach() for x in saved]
        given = [x for x in views if x is not None]
        for x in given:
            x.requires_grad_()
        firsts = torch.autograd.grad(function(*views[1:]), given[1:], given[0], create_graph=True)
        vectors = [g for x, g in zip(views[1:], grad_grads, strict=True) if x is not None]
        seconds = iter(torch.autograd.grad(firsts, given, vectors, create_graph=create_graph, materialize_grads=True))
    return [None if x is None else next(seconds) for x in views]


def _logits(
    q: Tensor,
    k: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    window: Window,
    border: str,
    scale: float,
    dot_taps: Callable[[Tensor, Tensor, Window], Tensor],
) -> Tensor:
    """Logits scale · q·(k + row + col) of every tap: (N, K, h, w, B). Taps that a ``"mask"`` border hides are -inf."""
    q = _at_centres(q, window) * scale
    logits = dot_taps(q, _pad(k, window), window).unflatten(1, (window.rows.kernel, window.cols.kernel))
    if row is not None:
        logits = logits + (row.mT @ q.flatten(2)).unflatten(2, q.shape[2:]).unsqueeze(2)
    if col is not None:
        logits = logits + (col.mT @ q.flatten(2)).unflatten(2, q.shape[2:]).unsqueeze(1)
    if border == "mask":
        inside_yh, inside_xw = window.rows.inside(q.device), window.cols.inside(q.device)
        inside_yxhwB = (inside_yh[:, None, :, None] & inside_xw[None, :, None, :]).unsqueeze(-1)
        logits = logits.masked_fill(~inside_yxhwB, float("-inf"))
    return logits.flatten(1, 2)


def _dot_taps(x_NDhwB: Tensor, padded_NDHWB: Tensor, window: Window) -> Tensor:
    """Product x · (padded image shifted by each tap), summed over the channels: (N, K, h, w, B)."""
    return torch.stack([(x_NDhwB * padded_NDHWB[:, :, ys, xs]).sum(1) for ys, xs in window.taps], dim=1)


def _dot_taps_reusing_memory(x_NDhwB: Tensor, padded_NDHWB: Tensor, window: Window) -> Tensor:
    """The same, for where nothing is traced: fresh memory for every product costs page faults, half of the time."""
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


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Keeps autocast, which has done its part on the arguments, off the products inside."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _batch_last(dtype: torch.dtype, *tensors_BNDHW: Tensor) -> list[Tensor]:
    return [tensor.to(dtype).movedim(0, -1).contiguous() for tensor in tensors_BNDHW]


def _batch_first(dtype: torch.dtype, chunks: list[Tensor]) -> Tensor:
    """The chunks, batch last, joined to one contiguous tensor with the batch first."""
    return torch.cat([chunk.movedim(-1, 0).to(dtype) for chunk in chunks]).contiguous()
