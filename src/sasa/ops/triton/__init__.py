"""The GPU kernels, in Triton, which is not imported before the first call that needs it."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_DEVICES = ("cuda", "xpu")  # "cuda" is also PyTorch's name for AMD GPUs
MOST_CHANNELS = 128
LEAST_CAPABILITY = (8, 0)


@functools.cache
def why_missing() -> str | None:
    """Why Triton can't be used; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return None


def interprets() -> bool:
    """Whether Triton's interpreter is enabled, which runs the kernels on the CPU, slowly, for testing."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def unsupported(images: Tensor, widest: int) -> str | None:
    """Why the kernels can't compute images with such heads; None if they can."""
    device = images.device
    if device.type not in _DEVICES and not (device.type == "cpu" and interprets()):
        return f"it computes on {' and '.join(_DEVICES)} devices, the query is on {device}"
    if images.dtype not in _DTYPES:
        return f"it computes {', '.join(map(str, _DTYPES))}, the query is {images.dtype}"
    if widest > MOST_CHANNELS:
        return f"it computes heads of up to {MOST_CHANNELS} channels, these have {widest}"
    pixels = images.shape[-2] * images.shape[-1]
    if pixels >= 2**31:
        return f"it computes images of fewer than 2**31 pixels, these have {pixels}"
    if device.type == "cuda" and torch.version.hip is None and _capability(device) < LEAST_CAPABILITY:
        return f"it computes on GPUs of compute capability 8.0 or newer, {device} has {_capability(device)}"
    reason = why_missing()
    if reason is None and device.type == "cpu" and not _is_interpreted():
        return "TRITON_INTERPRET was set after Triton had been imported: set it before Python starts"
    return reason


def automatic(images: Tensor) -> bool:
    """Whether to choose the kernels by default: not in the interpreter, which is for tests."""
    return images.device.type != "cpu"


def _is_interpreted() -> bool:
    from . import launch

    return launch.INTERPRETED


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """As :func:`sasa.ops.eager.forward`."""
    from . import launch

    return launch.forward(*arguments)


def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As :func:`sasa.ops.eager.backward`."""
    from . import launch

    return launch.backward(*arguments)


@contextlib.contextmanager
def using(variant: str) -> Iterator[None]:
    """Context in which every call uses one variant of the kernels, to test and benchmark it.

    Args:
        variant: ``"halo"``, on tensor cores, or ``"taps"``, tap by tap. By default float32 runs tap by tap, unless TF32
            is allowed in PyTorch, and half precision runs on tensor cores.

    Raises:
        ValueError: neither of them.
    """
    from . import launch

    if variant not in ("halo", "taps"):
        raise ValueError(f"variant: expected 'halo' or 'taps', got {variant!r}")
    before = launch.forced
    launch.forced = variant == "halo"
    try:
        yield
    finally:
        launch.forced = before
