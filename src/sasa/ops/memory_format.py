"""Memory formats of (B, N, D, H, W) tensors: contiguous, or the view of a channels_last (B, N·D, H, W) tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import is_transformed

EmbeddingLayout = tuple[tuple[int, ...], int]  # strides of (N, channels, taps), and channels


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of (B, N, D, H, W) are adjacent in memory, as in a view of a channels_last
    (B, N·D, H, W) tensor.
    """
    channels = 1 if x.shape[2] == 1 else 2  # the stride of a dimension of size 1 says nothing
    return x.stride(channels) == 1 and x.stride(4) != 1


def empty(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An empty (B, N, channels, height, width) tensor in the memory format of ``like``."""
    batch, heads = like.shape[:2]
    size = batch, heads, channels, height, width
    if is_channels_last(like):  # not a permuted view: an autograd.Function's output could then not be changed in place
        image = heads * channels
        return like.new_empty_strided(size, (height * width * image, channels, 1, width * image, image))
    return like.new_empty(size)


def in_format_of(like: Tensor, x: Tensor) -> Tensor:
    """``x`` in the memory format of ``like``: ``x`` itself if it already has it."""
    if x.is_contiguous() if not is_channels_last(like) else x.permute(0, 3, 4, 1, 2).is_contiguous():
        return x
    if is_transformed():  # vmap can't write into a tensor of a single sample
        return (
            x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) if is_channels_last(like) else x.contiguous()
        )
    return empty(like, *x.shape[2:]).copy_(x)


def is_channels_last_image(x: Tensor) -> bool:
    """Whether (B, C, H, W) is dense in channels_last, and in no other format."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def like_image(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in channels_last if ``like``, (B, C, H, W), is: PyTorch's float64 convolution doesn't keep the format."""
    if is_transformed():  # vmap can't tell
        return x
    if is_channels_last_image(like):
        return x.contiguous(memory_format=torch.channels_last)
    return x


def empty_image(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An empty (B, channels, height, width) tensor in the memory format of ``like``, (B, C, H, W)."""
    size = like.shape[0], channels, height, width
    if like.stride(1) == 1 and like.stride(3) != 1:
        return like.new_empty_strided(size, (height * width * channels, 1, width * channels, channels))
    return like.new_empty(size)


def strides_of(table: Tensor | None) -> tuple[int, ...] | None:
    """Strides of a table, (N, rows, columns); None for none."""
    return None if table is None else table.stride()


def layout_of(embedding: Tensor | None, num_heads: int) -> EmbeddingLayout | None:
    """Strides and channels of an embedding, (N, channels, taps) or (N·channels, taps); None for none."""
    if embedding is None:
        return None
    if embedding.dim() == 3:
        return embedding.stride(), embedding.shape[1]
    channels, (channel, tap) = embedding.shape[0] // num_heads, embedding.stride()
    return (channels * channel, channel, tap), channels
