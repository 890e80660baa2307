"""Autocast: arguments are cast once, and the operations inside stay as they are."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

_AS_IT_IS = contextlib.nullcontext()
_HAVE_AUTOCAST = ("cpu", "cuda")


def autocast(*tensors: Tensor | None) -> tuple:
    """The tensors in autocast's dtype, except float64 and anything that is not a floating-point tensor."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not is_active(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Disables autocast, already applied to the arguments, for the products inside."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if is_active(device) else _AS_IT_IS


def is_active(device: str) -> bool:
    """Whether autocast is enabled on this kind of device."""
    # PyTorch raises for devices without autocast; querying its availability takes longer than a small kernel.
    return (device in _HAVE_AUTOCAST or torch.amp.is_autocast_available(device)) and torch.is_autocast_enabled(device)
