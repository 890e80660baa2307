"""Training on images with Lightning. Needs the extra ``train``; Lightning, timm and torchvision are imported on use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .._extras import check_installed

check_installed(("lightning", "torchmetrics", "torchvision", "timm", "safetensors", "rich", "tensorboard"), "train")

from .errors import DataError, NonFiniteLoss, OptionError, OutputError, Stopped, UserError  # noqa: E402
from .recipe import Recipe  # noqa: E402

if TYPE_CHECKING:
    from .fit import Result, train
    from .weights import load_model

__all__ = [
    "DataError",
    "NonFiniteLoss",
    "OptionError",
    "OutputError",
    "Recipe",
    "Result",
    "Stopped",
    "UserError",
    "load_model",
    "train",
]

_HEAVY = {"Result": ".fit", "load_model": ".weights", "train": ".fit"}


def __getattr__(name: str) -> Any:
    """Import on first use what needs Lightning or timm."""
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HEAVY[name], __name__), name)
