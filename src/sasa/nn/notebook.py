"""Conversion of weights of the notebook's ``RelativeSelfAttention`` module to this layer's.

That module keeps three 1x1 convolutions (``qx``, ``kx``, ``vx``) and cuts the embedding into a row half and a column
half *before* it splits the channels into heads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_PROJECTIONS = ("qx.0", "kx.0", "vx.0")
_WEIGHTS = [f"{name}.weight" for name in _PROJECTIONS]
_BIASES = [f"{name}.bias" for name in _PROJECTIONS]
_EMBEDDINGS = ["row_embeddings", "col_embeddings"]


def read_notebook_weights(state_dict: Mapping[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """The layer's arguments implied by the weights, and its own state dict.

    Raises:
        ValueError: keys missing or unknown, shapes that don't fit each other, or an even window.
    """
    bias = any(key in state_dict for key in _BIASES)
    expected = _WEIGHTS + _EMBEDDINGS + (_BIASES if bias else [])
    missing = [key for key in expected if key not in state_dict]
    unknown = [key for key in state_dict if key not in expected]
    if missing or unknown:
        raise ValueError(
            f"state_dict: expected the keys of the notebook's module; missing: {missing or 'none'}, "
            f"unknown: {unknown or 'none'}"
        )
    first = state_dict[_WEIGHTS[0]]
    if first.dim() != 4 or first.shape[2:] != (1, 1):
        raise ValueError(f"qx.0.weight: expected shape (out, in, 1, 1), got {tuple(first.shape)}")
    out_channels, in_channels = first.shape[:2]
    row = state_dict["row_embeddings"]
    kernel_size = row.shape[-1]
    shapes = dict.fromkeys(_WEIGHTS, (out_channels, in_channels, 1, 1))
    shapes |= dict.fromkeys(_EMBEDDINGS, (out_channels // 2, kernel_size))
    if bias:
        shapes |= dict.fromkeys(_BIASES, (out_channels,))
    for key, shape in shapes.items():
        if tuple(state_dict[key].shape) != shape:
            raise ValueError(f"{key}: expected shape {shape} to match qx.0.weight, got {tuple(state_dict[key].shape)}")
    if out_channels % 2 or kernel_size % 2 == 0:
        raise ValueError(
            f"state_dict: expected an even number of channels and an odd window, all the notebook's module can run, "
            f"got {out_channels} channels and a window of {kernel_size}"
        )
    weights = {
        "qkv.weight": torch.cat([state_dict[key] for key in _WEIGHTS]),
        "row_embedding": row,
        "col_embedding": state_dict["col_embeddings"],
    }
    if bias:
        weights["qkv.bias"] = torch.cat([state_dict[key] for key in _BIASES])
    arguments = {"in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size, "bias": bias}
    return arguments, weights
