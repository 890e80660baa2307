"""Builds any of the networks by name."""

from __future__ import annotations

import inspect
import math
from typing import Any

import timm
from timm.models.resnet import ResNet
from torch import nn

from ..ops import checks
from .presets import MODELS, SMALL_MODELS, scaled
from .sasa_resnet import SasaResNet
from .small_resnet import SmallResNet

_NOT_OPTIONS = {"self", "block", "size", "spatial", "num_classes", "in_chans", "kwargs", "device", "dtype"}
OPTIONS = tuple(
    dict.fromkeys(
        name
        for network in (SasaResNet, ResNet)
        for name in inspect.signature(network.__init__).parameters
        if name not in _NOT_OPTIONS
    )
)
"""Arguments of the paper's networks themselves. Further arguments of timm's factory, such as ``checkpoint_path`` and
``pretrained_cfg``, read files and URLs, which options from other people's recipes and weights files must not do.
"""
SMALL_OPTIONS = ("width", *(p for p in inspect.signature(SmallResNet.__init__).parameters if p not in _NOT_OPTIONS))


def create_model(name: str, num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    """Build the network called ``name``, with fresh parameters. Nothing is read from files or the network.

    Args:
        name: one of :data:`sasa.models.MODELS`.
        num_classes: outputs of the classifier.
        in_chans: channels of the images.
        **kwargs: of the paper's networks: arguments of :class:`sasa.models.SasaResNet` and timm's ``ResNet`` (for those
            of timm's factory, such as ``features_only``, call ``timm.create_model``). Of the small ones: ``width``, a
            factor on all widths inside and between the blocks (rounded to whole channels per head), 1 by default, and
            the options of :class:`sasa.models.SmallResNet`.

    Raises:
        ValueError: there is no network of that name, or an argument is out of range.
        TypeError: an argument that the network doesn't have.
    """
    checks.choice("name", name, MODELS)
    options = SMALL_OPTIONS if name in SMALL_MODELS else OPTIONS
    unknown = sorted(set(kwargs) - set(options))
    if unknown:
        raise TypeError(f"expected arguments of {name} ({', '.join(options)}), got {', '.join(unknown)}")
    for option, value in kwargs.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{option}: expected a finite number, got {value}")
    if name not in SMALL_MODELS:
        return timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **kwargs)
    size, spatial = SMALL_MODELS[name]
    return SmallResNet(scaled(size, kwargs.pop("width", 1.0)), spatial, num_classes, in_chans, **kwargs)
