"""What a network predicts, and what it would predict with its attention changed or part of the image covered."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..nn import RelativeSelfAttention
from .looking import Layer

POSITION = ("row_embedding", "col_embedding", "position_bias")
"""The parameters of relative position; a layer has those of its kind."""


def predict(network: nn.Module, image: Tensor, *, position: bool = True, temperature: float = 1.0) -> Tensor | None:
    """The network's class probabilities with attention changed in every layer at once; the network is left unchanged.

    Args:
        network: run in evaluation mode without gradients.
        image: as the network expects it, (C, H, W).
        position: whether relative position is used; False sets every embedding and table to 0.
        temperature: the logits of attention are divided by it: below 1 sharper, above 1 more even.

    Returns:
        (classes,), or None if the output is not (1, classes).

    Raises:
        ValueError: the temperature is not a positive number, or a layer's projection is not its own convolution.
    """
    if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        raise ValueError(f"temperature: expected a positive number, got {temperature!r}")
    modes = [(module, module.training) for module in network.modules()]
    try:
        with torch.no_grad():
            output = functional_call(network.eval(), _changed(network, position, temperature), (image[None],))
    finally:
        for module, training in modes:
            module.training = training
    return probabilities(output)


def probabilities(output: Any) -> Tensor | None:
    """(classes,) from a classifier's logits for one image; None for any other output, or if it contains NaN."""
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != 1 or not output.isfinite().all():
        return None
    return output[0].detach().float().cpu().softmax(0)


def has_position(network: nn.Module) -> bool:
    """Whether a layer of the network has relative position."""
    layers = [module for module in network.modules() if isinstance(module, Layer)]
    return any(getattr(layer, name, None) is not None for layer in layers for name in POSITION)


def cover(image: Tensor, top: int, left: int, bottom: int, right: int) -> Tensor:
    """A copy of the image, (C, H, W), with a rectangle filled with the mean of each channel. Ends are not included."""
    image = image.clone()
    top, left = max(top, 0), max(left, 0)
    image[:, top : max(bottom, top), left : max(right, left)] = image.mean((1, 2))[:, None, None]
    return image


def _changed(network: nn.Module, position: bool, temperature: float) -> dict[str, Tensor]:
    """Parameters to run the network with, by name: those that change."""
    changed: dict[str, Tensor] = {}
    for name, layer in network.named_modules():
        if not isinstance(layer, Layer):
            continue
        prefix = f"{name}." if name else ""
        if not position:
            for part in POSITION:
                parameter = getattr(layer, part, None)
                if parameter is not None:
                    changed[prefix + part] = torch.zeros_like(parameter)
        if temperature != 1:
            # Logits are linear in the queries, so their projection is divided; a table is added to them.
            table = getattr(layer, "position_bias", None)
            if position and table is not None:
                changed[f"{prefix}position_bias"] = table.detach() / temperature
            plain = isinstance(layer, RelativeSelfAttention)
            projection, queries = ("qkv", slice(layer.out_channels)) if plain else ("query", slice(None))
            convolution = getattr(layer, projection)
            if type(convolution) is not nn.Conv2d:
                raise ValueError(
                    f"temperature: expected a plain convolution to queries in {name}, got {type(convolution).__name__}"
                )
            for part, tensor in convolution.named_parameters():
                changed[f"{prefix}{projection}.{part}"] = tensor.detach().clone()
                changed[f"{prefix}{projection}.{part}"][queries] /= temperature
    return changed
