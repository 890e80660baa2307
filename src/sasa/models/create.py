"""Any of the networks by its name."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from ..ops import checks
from .presets import MODELS, SMALL_MODELS, scaled
from .small_resnet import SmallResNet


def create_model(name: str, num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    """Build the network called ``name``, with fresh parameters.

    Args:
        name: one of :data:`sasa.models.MODELS`.
        num_classes: outputs of the classifier.
        in_chans: channels of the images.
        **kwargs: of the paper's networks: arguments of :class:`sasa.models.SasaResNet`, and what
            ``timm.create_model`` takes (``features_only``). Of the small ones: ``width``, a factor of all widths
            inside and between the blocks (to whole channels a head), 1 if left out.

    Raises:
        ValueError: no network of that name, or an argument out of range.
        TypeError: an argument that the network doesn't have.
    """
    checks.choice("name", name, MODELS)
    if name not in SMALL_MODELS:
        return timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **kwargs)
    size, spatial = SMALL_MODELS[name]
    return SmallResNet(scaled(size, **kwargs), spatial, num_classes, in_chans)
