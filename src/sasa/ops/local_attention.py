"""Local self-attention with relative row and column embeddings: the user-facing function.

The equation, for a query at pixel p and one head::

    logit_t = scale · q[p]·( k[p + t] + row[dy] + col[dx] ) + bias[dy, dx]    for every tap t = (dy, dx) around p
    y[p]    = sum over t of  softmax_t(logit) · v[p + t]

Source: Ramachandran et al., *Stand-Alone Self-Attention in Vision Models*, 2019, arXiv 1906.05909, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from . import checks
from .attend import attend_heads, attend_heads_with_lse, attend_weights
from .precision import autocast
from .window import BORDERS

Pair = int | Sequence[int]


@overload
def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Pair,
    *,
    row_embedding: Tensor | None = None,
    col_embedding: Tensor | None = None,
    bias: Tensor | None = None,
    stride: Pair = 1,
    dilation: Pair = 1,
    border: str = "zero",
    scale: float = 1.0,
    implementation: str | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Pair,
    *,
    row_embedding: Tensor | None = None,
    col_embedding: Tensor | None = None,
    bias: Tensor | None = None,
    stride: Pair = 1,
    dilation: Pair = 1,
    border: str = "zero",
    scale: float = 1.0,
    implementation: str | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Pair,
    *,
    row_embedding: Tensor | None = None,
    col_embedding: Tensor | None = None,
    bias: Tensor | None = None,
    stride: Pair = 1,
    dilation: Pair = 1,
    border: str = "zero",
    scale: float = 1.0,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Local self-attention: every query attends to the kh x kw window of keys around it.

    .. math::
        y_p = \sum_t \operatorname{softmax}_t\bigl(
        \text{scale}\; q_p \cdot (k_{p+t} + row_{dy} + col_{dx}) + bias_{dy, dx}\bigr) \, v_{p+t}

    The N heads are independent. ``(B, C, H, W)`` tensors become ``(B, N, D, H, W)`` by ``x.unflatten(1, (N, D))``,
    a view for contiguous and channels_last tensors alike.

    Args:
        query: (B, N, D, H, W), any strides; float16, bfloat16, float32 or float64.
        key: (B, N, D, H, W).
        value: (B, N, Dv, H, W).
        kernel_size: window size, int or (kh, kw). An even window reaches one tap further after its centre than before.
        row_embedding: (N, D, kh), added to the keys by row of the window.
        col_embedding: (N, D, kw), added to the keys by column of the window.
        bias: (N, kh, kw), added to the logits by tap, after ``scale``: a table of relative position biases.
        stride: distance in pixels between window centres, int or (height, width).
        dilation: distance in pixels between taps, int or (height, width).
        border: what lies outside the image. ``"zero"``: zero keys and zero values that take part in the softmax,
            with their position term; ``"mask"``: nothing, those taps take no part; ``"valid"``: only windows that lie
            inside are computed; ``"shift"``: windows that reach out of the image are moved inside, along the pixels
            that the dilation steps on, so that every query sees kh x kw pixels, as in neighborhood attention (Hassani
            et al. 2023, arXiv 2204.07143). A tap is then at an offset of up to k - 1 from its query, on either side:
            embeddings and bias are indexed by offset, -(k - 1) first, and have 2kh - 1 and 2kw - 1 entries.
        scale: factor on the logits; 1 in the paper.
        implementation: ``None`` takes the fastest that supports the call. One requested by name (see ``sasa info``) is
            never replaced by another: if it doesn't support the call, an error is raised. ``"reference"`` is the
            equation itself, in PyTorch's own operations.
        return_lse: whether to return the log-sum-exp of each query's logits too. With it, attention over several sets
            of keys can be merged: weight the outputs by the softmax of their log-sum-exps.

    Returns:
        (B, N, Dv, H', W') in the memory format of ``query``; with ``return_lse`` also (B, N, H', W') in float32, or
        float64 for float64, differentiable as the output is. H' = floor((H - 1) / stride) + 1 for ``"zero"``,
        ``"mask"`` and ``"shift"``; floor((H - (kh - 1)·dilation - 1) / stride) + 1 for ``"valid"``.

    Raises:
        ValueError: invalid or inconsistent shapes, dtypes, devices or options, naming the argument; with ``"shift"``
            also an image of fewer than kh · dilation rows or kw · dilation columns.
        TypeError: an argument of the wrong Python type.

    Note:
        Under autocast all tensors are cast to its dtype. Half precision accumulates in float32. Derivatives of every
        order exist for every tensor, and the transforms of torch.func; those beyond the first in reverse mode are
        computed by the equation, in PyTorch's own operations. The output may be changed in place.

    Example:
        >>> q, k, v = torch.randn(3, 2, 8, 16, 28, 28)  # batch 2, 8 heads of width 16
        >>> rows = cols = torch.randn(8, 16, 7)
        >>> sasa.local_attention(q, k, v, 7, row_embedding=rows, col_embedding=cols).shape
        torch.Size([2, 8, 16, 28, 28])
    """
    sizes = checks.pair("kernel_size", kernel_size), checks.pair("stride", stride), checks.pair("dilation", dilation)
    scale = checks.number("scale", scale)
    checks.choice("border", border, BORDERS)
    checks.implementation(implementation)
    query, key, value, row, col, bias = autocast(query, key, value, row_embedding, col_embedding, bias)
    checks.same_kind(query=query, key=key, value=value, row_embedding=row, col_embedding=col, bias=bias)
    checks.shapes(query, key, value, row, col, bias, sizes[0], border)
    run = attend_heads_with_lse if checks.flag("return_lse", return_lse) else attend_heads
    return run(query, key, value, row, col, bias, *sizes, border, scale, implementation)


def local_attention_weights(
    query: Tensor,
    key: Tensor,
    kernel_size: Pair,
    *,
    row_embedding: Tensor | None = None,
    col_embedding: Tensor | None = None,
    bias: Tensor | None = None,
    stride: Pair = 1,
    dilation: Pair = 1,
    border: str = "zero",
    scale: float = 1.0,
    implementation: str | None = None,
) -> Tensor:
    """The attention weights of :func:`local_attention`, for inspection.

    Args:
        query: (B, N, D, H, W); this and all others as in :func:`local_attention`.
        key: (B, N, D, H, W).
        kernel_size: window size.
        row_embedding: (N, D, kh).
        col_embedding: (N, D, kw).
        bias: (N, kh, kw).
        stride: distance between window centres.
        dilation: distance between taps.
        border: ``"zero"``, ``"mask"``, ``"valid"`` or ``"shift"``.
        scale: factor on the logits.
        implementation: None or ``"reference"``; no kernel stores the weights.

    Returns:
        (B, N, kh·kw, H', W'): taps row by row, summing to 1 over the third dimension. Differentiable.

    Raises:
        ValueError: as :func:`local_attention`; also for any other implementation.
        TypeError: as :func:`local_attention`.
    """
    sizes = checks.pair("kernel_size", kernel_size), checks.pair("stride", stride), checks.pair("dilation", dilation)
    scale = checks.number("scale", scale)
    checks.choice("border", border, BORDERS)
    checks.choice("implementation", implementation, (None, "reference"))
    query, key, row, col, bias = autocast(query, key, row_embedding, col_embedding, bias)
    checks.same_kind(query=query, key=key, row_embedding=row, col_embedding=col, bias=bias)
    checks.shapes(query, key, None, row, col, bias, sizes[0], border)
    return attend_weights(query, key, row, col, bias, *sizes, border, scale)
