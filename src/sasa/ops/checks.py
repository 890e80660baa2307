"""Errors for invalid arguments: each names the argument, what was expected and what was given."""

from __future__ import annotations

import functools
import numbers
import sys
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from .implementations import names
from .window import MOST_TAPS, Pair, cropped, must_hold, reach

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_PARAMETERS = 2**30  # of a layer: 4 GiB in float32
_LONGEST = 2**31  # pixels along a side that no image has


def pair(name: str, value: int | Sequence[int], minimum: int = 1) -> tuple[int, int]:
    """``value`` as (height, width): an int stands for both.

    Raises:
        TypeError: not an int and not a pair of ints.
        ValueError: below ``minimum``, or not two of them.
    """
    if type(value) is int and value >= minimum:
        return value, value
    expected = f"{name}: expected an int or a (height, width) pair of ints, each at least {minimum}, got {value!r}"
    values = [value, value] if _is_int(value) else value
    if not isinstance(values, (list, tuple)) or not all(_is_int(v) for v in values):
        raise TypeError(expected)
    if len(values) != 2 or any(v < minimum for v in values):
        raise ValueError(expected)
    return int(values[0]), int(values[1])


def _is_int(value: object) -> TypeGuard[int]:
    """Whether this is an int, Python's or NumPy's; a bool doesn't count."""
    return type(value) is int or (isinstance(value, numbers.Integral) and not isinstance(value, bool))


def choice(name: str, value: object, allowed: Sequence[str | bool | None]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if not (value is None or isinstance(value, (str, bool))) or value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def implementation(name: str | None) -> None:
    """Raise ValueError unless an implementation has this name, or none is requested."""
    if name is not None and (not isinstance(name, str) or name not in names()):
        raise ValueError(f"implementation: expected None or one of {', '.join(map(repr, names()))}, got {name!r}")


def flag(name: str, value: bool) -> bool:
    """``value``; raises TypeError unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def positive(name: str, value: int) -> int:
    """``value`` as an int; raises TypeError unless it is one, ValueError unless it is at least 1."""
    if not _is_int(value):
        raise TypeError(f"{name}: expected an int of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)


def number(name: str, value: float) -> float:
    """``value`` as a float; raises TypeError unless it is a number, ValueError unless it is finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not isinstance(value, (int, float)):
        value = float(value)  # one of NumPy's
    # Unlike math.isfinite and float(), a comparison also works on a number that torch.compile traces as a symbol.
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"{name}: expected a finite number, got {value if isinstance(value, float) else repr(value)}")
    return value * 1.0


def scale_of(scale: float, dtype: torch.dtype) -> None:
    """Raise ValueError unless the factor on the logits is finite in the dtype that they are computed in."""
    most = torch.finfo(torch.promote_types(dtype, torch.float32)).max
    if not -most <= scale <= most:
        raise ValueError(f"scale: expected at most {most:.4g} in magnitude for tensors of {dtype}, got {scale}")


def parameters(count: int, **arguments: object) -> None:
    """Raise ValueError if ``arguments`` imply more parameters than anyone could intend."""
    if count > MOST_PARAMETERS:
        given = ", ".join(f"{name}={value}" for name, value in arguments.items())
        raise ValueError(f"{', '.join(arguments)}: expected at most {MOST_PARAMETERS} parameters in all, got {given}")


def same_kind(**tensors: Tensor | None) -> None:
    """Raise unless all given are tensors with the floating-point dtype and the device of the first."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor is None and (name == "bias" or name.endswith("embedding")):
            continue
        if not isinstance(tensor, Tensor) or not isinstance(first, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: expected a dtype of float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.dtype != first.dtype:
            raise ValueError(f"{name}: expected dtype {first.dtype} as {first_name} has, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name}: expected device {first.device} as {first_name} is on, got {tensor.device}")


def parameters_fit(x: Tensor, **parameters: Tensor | None) -> None:
    """Raise ValueError unless a layer's parameters have the dtype of ``x`` and are on its device: kernels only see
    addresses.
    """
    same_kind(x=x, **{name: parameter for name, parameter in parameters.items() if parameter is not None})


def shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    row_embedding: Tensor | None,
    col_embedding: Tensor | None,
    bias: Tensor | None,
    kernel_size: tuple[int, int],
    border: str,
) -> None:
    """Raise ValueError unless the shapes fit each other."""
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
    entries, rule, fits = kernel_size, "kernel {}", "to match query and kernel_size"
    if border == "shift":  # one for each offset
        entries, rule = (2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1), "2 * kernel {} - 1"
        fits = "to match query, kernel_size and border='shift'"
    for name, embedding, taps, side in (
        ("row_embedding", row_embedding, entries[0], "height"),
        ("col_embedding", col_embedding, entries[1], "width"),
    ):
        if embedding is not None and tuple(embedding.shape) != (heads, width, taps):
            raise ValueError(
                f"{name}: expected shape (heads, head width, {rule.format(side)}) = ({heads}, {width}, {taps}) "
                f"{fits}, got {tuple(embedding.shape)}"
            )
    if bias is not None and tuple(bias.shape) != (heads, *entries):
        raise ValueError(
            f"bias: expected shape (heads, {rule.format('height')}, {rule.format('width')}) = "
            f"({heads}, {entries[0]}, {entries[1]}) {fits}, got {tuple(bias.shape)}"
        )


def window_sizes(
    size: Sequence[int], kernel_size: Pair, stride: Pair, dilation: Pair, border: str
) -> tuple[Pair, Pair, Pair, tuple[slice, slice] | None]:
    """Kernel size, stride and dilation cut to what the image needs, and the taps of rows and columns that remain in the
    window; None for all.

    Results are exactly those of the sizes given: steps longer than the image are equivalent to steps of its length, and
    taps that a ``"mask"`` border hides from every pixel have no effect.

    Raises:
        ValueError: the image holds no window (``"valid"``, ``"shift"``), or the window has more taps than are
            supported.
    """
    if not torch.compiler.is_compiling():
        return _window_sizes(size[0], size[1], kernel_size, stride, dilation, border)
    # Symbolic sizes are not compared: that would specialize compiled code to them; the operators' sizes have 64 bits.
    if max(kernel_size) >= _LONGEST:
        raise ValueError(f"kernel_size: expected fewer than {_LONGEST} taps, got {kernel_size}")
    stride, dilation = ((min(y, _LONGEST - 1), min(x, _LONGEST - 1)) for y, x in (stride, dilation))
    return kernel_size, stride, dilation, None


@functools.lru_cache(maxsize=1024)
def _window_sizes(
    height: int, width: int, kernel_size: Pair, stride: Pair, dilation: Pair, border: str
) -> tuple[Pair, Pair, Pair, tuple[slice, slice] | None]:
    size, taps = (height, width), None
    if border == "valid":
        spans = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True)]
        if max(spans) >= _LONGEST:
            raise ValueError(
                f"kernel_size, dilation: expected a window shorter than {_LONGEST} pixels, "
                f"got kernel_size={kernel_size}, dilation={dilation}"
            )
        if size[0] < spans[0] or size[1] < spans[1]:
            raise ValueError(
                f"query: expected an image of at least {spans[0]}x{spans[1]} pixels, the window with its dilation, "
                f"for border='valid', got {size[0]}x{size[1]}"
            )
    if border == "shift":
        must_hold(size, kernel_size, dilation)
    stride = min(stride[0], size[0]), min(stride[1], size[1])
    dilation = min(dilation[0], size[0]), min(dilation[1], size[1])
    if border == "mask":
        taps = cropped(kernel_size[0], size[0], dilation[0]), cropped(kernel_size[1], size[1], dilation[1])
        left = taps[0].stop - taps[0].start, taps[1].stop - taps[1].start
        kernel_size, taps = left, None if left == kernel_size else taps
    if border == "zero":
        most_taps(size, kernel_size, dilation)
    return kernel_size, stride, dilation, taps


def most_taps(size: Sequence[int], kernel_size: Pair, dilation: Pair) -> None:
    """Raise ValueError if a window has more taps beyond the image than are supported."""
    most = tuple(max(MOST_TAPS, 2 * reach(n, d) + 2) for n, d in zip(size, dilation, strict=True))
    if kernel_size[0] > most[0] or kernel_size[1] > most[1]:
        raise ValueError(
            f"kernel_size: expected at most {most[0]} x {most[1]} taps for an image of {size[0]} x {size[1]} pixels, "
            f"got {kernel_size[0]} x {kernel_size[1]}"
        )


def layer_input(x: Tensor, in_channels: int, weight: Tensor | None) -> None:
    """Raise unless ``x`` is (B, in_channels, H, W) or (in_channels, H, W) with at least one pixel, on the device and in
    the dtype of a layer's weight, if that is given.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
    if x.dim() not in (3, 4) or x.shape[-3] != in_channels:
        raise ValueError(f"x: expected shape (batch, in_channels={in_channels}, height, width), got {tuple(x.shape)}")
    if x.shape[-1] < 1 or x.shape[-2] < 1:
        raise ValueError(f"x: expected at least one pixel, got shape {tuple(x.shape)}")
    if weight is None:
        return
    if x.device != weight.device:
        raise ValueError(f"x: expected device {weight.device} as the parameters are on, got {x.device}")
    if not x.is_floating_point() or (x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type)):
        raise ValueError(f"x: expected dtype {weight.dtype} as the parameters have, got {x.dtype}")
