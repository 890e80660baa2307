"""Trained weights as safetensors, with the facts needed to use them, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from ..models import create_model
from .checkpoints import write_whole


def save_weights(network: nn.Module, path: Path, facts: dict[str, Any]) -> None:
    """Write the network's parameters and buffers, and ``facts`` as the file's metadata."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in network.state_dict().items()}
    write_whole(path, save(tensors, metadata={name: json.dumps(fact) for name, fact in facts.items()}))


def load_model(path: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network in ``model.safetensors``, in evaluation mode, and its facts.

    Returns:
        The network, and a dict of ``model``, ``model_options``, ``classes``, ``in_chans``, ``image_size``,
        ``crop_pct``, ``mean`` and ``std``.

    Raises:
        ValueError: not a safetensors file that ``sasa train`` wrote, or weights that don't fit the network.
        FileNotFoundError: no such file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = {name: json.loads(fact) for name, fact in (file.metadata() or {}).items() if name != "format"}
        options = facts.get("model_options", {})
        network = create_model(facts["model"], len(facts["classes"]), facts["in_chans"], **options)
        network.load_state_dict(load_file(path))
    except (SafetensorError, KeyError, RuntimeError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"path: {path} does not hold weights written by sasa train: {error}") from error
    return network.eval(), facts
