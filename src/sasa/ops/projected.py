"""Projection and attention, a few images at a time, for implementations that don't project themselves.

    q, k, v = W x + b per pixel,        y = local attention of q, k, v

Queries, keys and values take three times the memory of the output. They are held for only a few images at a time, and
the backward projects them again: only the input is saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .pooling import average_pool
from .window import Window

if TYPE_CHECKING:
    from .implementations import Backward, Forward

LayerGradients = tuple[Tensor, *tuple[Tensor | None, ...]]  # of input and parameters

# Bytes of queries, keys and values held at once: enough to keep all cores busy, and few enough that each part reuses
# the memory of the previous one.
PART_BYTES = 2**26


def parts(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """Slices of the batch, equally large, whose queries, keys and values take up to PART_BYTES."""
    image = weight.shape[0] * x.shape[2] * x.shape[3] * x.element_size()
    count = min(-(-x.shape[0] * image // PART_BYTES), x.shape[0])
    if count == 1:
        yield slice(None)
        return
    bounds = [x.shape[0] * part // max(1, count) for part in range(count + 1)]
    yield from map(slice, bounds[:-1], bounds[1:])


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3·N·D, H, W) as queries, keys and values, each (B, N, D, H, W): views."""
    batch, channels, height, width = qkv.shape
    query, key, value = qkv.view(batch, 3 * num_heads, channels // 3 // num_heads, height, width).chunk(3, dim=1)
    return query, key, value


def by_head(embedding: Tensor | None, num_heads: int) -> Tensor | None:
    """(N·channels, taps) as (N, channels, taps)."""
    if embedding is None or embedding.dim() == 3:
        return embedding
    return embedding.view(num_heads, embedding.shape[0] // num_heads, embedding.shape[1])


def channels_of(x: Tensor, weight: Tensor | None) -> int:
    """N·D, of a layer's input and weight, or of the projections themselves."""
    return (x.shape[1] if weight is None else weight.shape[0]) // 3


def is_large(x: Tensor, weight: Tensor) -> bool:
    """Whether the queries, keys and values of the batch take more than PART_BYTES."""
    return x.numel() // max(1, x.shape[1]) * weight.shape[0] * x.element_size() > PART_BYTES


def pixels_of(x: Tensor) -> Tensor:
    """(B, C, H, W) as a matrix with a row for each pixel; a view for channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def heads_of(pixels: Tensor, shape: torch.Size, num_heads: int) -> tuple[Tensor, ...]:
    """Each pixel's queries, keys and values as (B, N, D, H, W) views. ``shape`` is that of the input."""
    images = pixels.view(shape[0], shape[2], shape[3], 3 * num_heads, -1).permute(0, 3, 4, 1, 2)
    return images.chunk(3, dim=1)


def forward(
    attention: Forward,
    output: Tensor,
    lse: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    num_heads: int,
    window: Window,
    scale: float,
    pool: int,
) -> tuple[Tensor, Tensor]:
    """Writes and returns the output (B, N·D, H', W') and the log-sum-exp (B, N, h, w)."""
    if weight is None:
        y, lse = attention(*split_heads(x, num_heads), row, col, table, window, scale)
        return output.copy_(average_pool(y.flatten(1, 2), pool)), lse
    weight = weight.flatten(1)
    for part in parts(x, weight):
        qkv = heads_of(F.linear(pixels_of(x[part]), weight, bias), x[part].shape, num_heads)
        y, lse[part] = attention(*qkv, row, col, table, window, scale)
        output[part] = average_pool(y.flatten(1, 2), pool)
    return output, lse


def backward(
    attention: Backward,
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    lse: Tensor,
    num_heads: int,
    window: Window,
    scale: float,
    pool: int,
) -> LayerGradients:
    """Gradients of input, weight, bias, row, col and table."""
    grad_input = torch.empty_like(x)
    grad_unpooled = before_pool(grad_output, window, pool).unflatten(1, (num_heads, -1))
    if weight is None:
        grads = attention(grad_unpooled, *split_heads(x, num_heads), row, col, table, lse, window, scale)
        for to, grad in zip(split_heads(grad_input, num_heads), grads[:3], strict=True):
            to.copy_(grad)
        return grad_input, None, None, *grads[3:]
    totals, weight = Totals(weight, bias, row, col, table), weight.flatten(1)
    for part in parts(x, weight):
        pixels = pixels_of(x[part])
        qkv = heads_of(F.linear(pixels, weight, bias), x[part].shape, num_heads)
        grads = attention(grad_unpooled[part], *qkv, row, col, table, lse[part], window, scale)
        grad = pixels_of(torch.cat([g.flatten(1, 2) for g in grads[:3]], dim=1))
        totals.add(grad.mT @ pixels, None if bias is None else grad.sum(0), *grads[3:])
        grad_input[part] = (grad @ weight).view(*x[part].permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    return grad_input, *totals.rounded()


def before_pool(grad: Tensor, window: Window, pool: int) -> Tensor:
    """Gradient of the pooling's input."""
    if pool == 1:
        return grad
    size = window.rows.outputs, window.cols.outputs
    unpooled = grad.new_empty((*grad.shape[:2], *size))
    if grad.is_contiguous(memory_format=torch.channels_last):
        unpooled = unpooled.to(memory_format=torch.channels_last)
    pools = [min(pool, length) for length in size]
    return torch.ops.aten.avg_pool2d_backward(grad, unpooled, pools, pools, [0, 0], True, True, None)


class Totals:
    """Gradients of a layer's parameters, summed over parts of the batch in float32 or better."""

    def __init__(self, *parameters: Tensor | None) -> None:
        self.likes = parameters
        self.sums: list[Tensor | None] = [None] * len(parameters)

    def add(self, *grads: Tensor | None) -> None:
        """Add gradients of the parameters; None for what is missing."""
        for i, grad in enumerate(grads):
            total = self.sums[i]
            if grad is None:
                continue
            if total is not None:
                total += grad
            else:
                self.sums[i] = grad.to(torch.promote_types(grad.dtype, torch.float32))

    def rounded(self) -> tuple[Tensor | None, ...]:
        """The gradients in the shape and dtype of their parameters; zeros for an empty batch."""
        pairs = zip(self.likes, self.sums, strict=True)
        return tuple(
            None if x is None else x.new_zeros(x.shape) if total is None else total.to(x.dtype).view_as(x)
            for x, total in pairs
        )
