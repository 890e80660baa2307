"""Errors for users' mistakes: each names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .window import BORDERS

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def pair(name: str, value: int | Sequence[int], minimum: int = 1) -> tuple[int, int]:
    """``value`` as (height, width): an int stands for both.

    Raises:
        TypeError: not an int and not a pair of ints.
        ValueError: below ``minimum``, or not two of them.
    """
    if type(value) is int and value >= minimum:
        return value, value
    expected = f"{name}: expected an int or a (height, width) pair of ints, each at least {minimum}, got {value!r}"
    values = [value, value] if isinstance(value, int) else value
    if not isinstance(values, (list, tuple, torch.Size)) or any(type(v) is not int for v in values):
        raise TypeError(expected)
    if len(values) != 2 or any(v < minimum for v in values):
        raise ValueError(expected)
    return values[0], values[1]


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def positive(name: str, value: int) -> None:
    """Raise TypeError unless ``value`` is an int, ValueError unless it is at least 1."""
    if type(value) is not int:
        raise TypeError(f"{name}: expected an int of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def number(name: str, value: float) -> float:
    """``value`` as a float; raises TypeError unless it is a number, ValueError unless it is finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    # A comparison, unlike math.isfinite and float(), also takes a number that torch.compile traces as a symbol.
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value * 1.0


def same_kind(**tensors: Tensor | None) -> None:
    """Raise unless all given are tensors of one floating dtype and on one device (those of the first)."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor is None and name.endswith("embedding"):
            continue
        if not isinstance(tensor, Tensor) or not isinstance(first, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: expected a dtype of float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.dtype != first.dtype:
            raise ValueError(f"{name}: expected dtype {first.dtype} as {first_name} has, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name}: expected device {first.device} as {first_name} is on, got {tensor.device}")


def shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    row_embedding: Tensor | None,
    col_embedding: Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    border: str,
) -> None:
    """Raise ValueError unless the shapes fit each other and the window fits a ``"valid"`` border."""
    choice("border", border, BORDERS)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor is not None and tensor.dim() != 5:
            raise ValueError(
                f"{name}: expected 5 dimensions (batch, heads, head width, height, width), "
                f"got {tensor.dim()}: {tuple(tensor.shape)}"
            )
    batch, heads, width, height_, width_ = query.shape
    if min(heads, width, height_, width_) < 1:
        raise ValueError(
            f"query: expected at least one head, channel, row and column (only the batch may be empty), "
            f"got shape {tuple(query.shape)}"
        )
    if key.shape != query.shape:
        raise ValueError(f"key: expected the shape of query, {tuple(query.shape)}, got {tuple(key.shape)}")
    if value is not None and (
        (value.shape[:2], value.shape[3:]) != (query.shape[:2], query.shape[3:]) or value.shape[2] < 1
    ):
        raise ValueError(
            f"value: expected shape ({batch}, {heads}, any, {height_}, {width_}) to match query, "
            f"got {tuple(value.shape)}"
        )
    for name, embedding, taps, side in (
        ("row_embedding", row_embedding, kernel_size[0], "height"),
        ("col_embedding", col_embedding, kernel_size[1], "width"),
    ):
        if embedding is not None and tuple(embedding.shape) != (heads, width, taps):
            raise ValueError(
                f"{name}: expected shape (heads, head width, kernel {side}) = ({heads}, {width}, {taps}) "
                f"to match query and kernel_size, got {tuple(embedding.shape)}"
            )
    if border == "valid":
        reach = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True)]
        if height_ < reach[0] or width_ < reach[1]:
            raise ValueError(
                f"query: expected an image of at least {reach[0]}x{reach[1]} pixels, the window with its dilation, "
                f"for border='valid', got {height_}x{width_}"
            )


def layer_input(x: Tensor, in_channels: int, weight: Tensor) -> None:
    """Raise ValueError unless ``x`` is (B, in_channels, H, W), on the device and in the dtype of a layer's weight."""
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(f"x: expected shape (batch, in_channels={in_channels}, height, width), got {tuple(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"x: expected device {weight.device} as the parameters are on, got {x.device}")
    if not x.is_floating_point() or (x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type)):
        raise ValueError(f"x: expected dtype {weight.dtype} as the parameters have, got {x.dtype}")
