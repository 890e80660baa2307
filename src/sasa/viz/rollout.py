"""How far a pixel sees through all the layers below: attention roll-out, down to the pixels of the image.

Between two layers the map may shrink. The share of attention at a pixel of the smaller map is spread evenly over the
pixels of the larger map that it covers::

    a_L = one at the query             a_{l-1} = spread( ½ a_l + ½ a_l · mean over heads of P_l )

Residual connections carry one half, attention the other; every other layer passes its share on unchanged. The share of
taps outside the image is lost. Source: Abnar and Zuidema 2020 (arXiv 2005.00928), section 3, for local attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .looking import Seen, cell


def roll_out(seen: Sequence[Seen], query: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Share of attention that one query of the last layer of ``seen`` gives to each pixel of the image.

    Args:
        seen: layers in the order in which they run, from :func:`look`.
        query: row and column of the query in the last of them.
        size: (height, width) of the image.

    Returns:
        (height, width), at least 0, summing to 1 or less: the rest fell outside the image.

    Raises:
        ValueError: there is no layer, or the query lies outside the last layer's map.
    """
    if not seen:
        raise ValueError("seen: expected at least one layer, got none")
    outputs = seen[-1].window.rows.outputs, seen[-1].window.cols.outputs
    if not all(0 <= place < most for place, most in zip(query, outputs, strict=True)):
        raise ValueError(f"query: expected (row, column) inside the {outputs[0]}x{outputs[1]} queries, got {query}")
    share = torch.zeros(outputs)
    share[query] = 1
    for layer, below in zip(reversed(seen), [*reversed(seen[:-1]), None], strict=True):
        window = layer.window
        weights = layer.weights().mean(0)
        padded = torch.zeros(
            window.rows.size + window.rows.before + window.rows.after,
            window.cols.size + window.cols.before + window.cols.after,
        )
        for t, (rows, cols) in enumerate(window.taps):
            padded[rows, cols] += share * weights[t] / 2
        top, left = (
            axis.before + before for axis, before in zip((window.rows, window.cols), layer.offset, strict=True)
        )
        on_map = padded[top : top + layer.size[0], left : left + layer.size[1]].clone()
        first = layer.centre((0, 0))
        stride = window.rows.stride, window.cols.stride
        inside = [
            (start + step * torch.arange(n)).clamp(0, side - 1)
            for start, step, n, side in zip(first, stride, outputs, layer.size, strict=True)
        ]
        on_map.index_put_((inside[0][:, None], inside[1]), share / 2, accumulate=True)
        outputs = size if below is None else (below.window.rows.outputs, below.window.cols.outputs)
        share = spread(on_map, outputs)
    return share


def spread(share: Tensor, size: tuple[int, int]) -> Tensor:
    """The same sum on a map of another size: a pixel's share is spread evenly over those that it covers."""
    rows, cols = (_cover(small, large) for small, large in zip(share.shape, size, strict=True))
    return rows.T @ share @ cols


def _cover(before: int, after: int) -> Tensor:
    """(before, after): the share of each pixel before that goes to each after; rows sum to 1."""
    matrix = torch.zeros(before, after)
    many, few = max(before, after), min(before, after)
    fine = torch.arange(many)
    coarse = (fine / cell(many, few)).long().clamp(max=few - 1)
    if after >= before:
        matrix[coarse, fine] = 1
    else:
        matrix[fine, coarse] = 1
    return matrix / matrix.sum(1, keepdim=True)
