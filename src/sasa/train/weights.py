"""Saving and loading of trained weights as safetensors, with the metadata needed to use them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from .._files import write_whole
from ..models import MODELS, create_model
from ..models.pretrained import find_weights
from .recipe import DETECTORS

LARGEST = 10_000
"""Maximum image side in pixels that a weights file may request."""


def save_weights(network: nn.Module, path: Path, facts: dict[str, Any]) -> None:
    """Write the network's parameters and buffers, and ``facts`` as the file's metadata."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in network.state_dict().items()}
    write_whole(path, save(tensors, metadata={name: json.dumps(fact) for name, fact in facts.items()}))


def load_model(path: Path | str, *, detectors: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network in ``model.safetensors``, in evaluation mode, and its facts. Nothing else is read.

    Args:
        path: the file, or the name of weights that ship with the package: clothing, fashion_mnist.
        detectors: whether a detector is accepted too.

    Returns:
        The network, and a dict of ``model``, ``model_options``, ``classes``, ``in_chans``, ``image_size``,
        ``crop_pct``, ``mean`` and ``std``; for a detector, ``category_ids`` and ``train_sizes`` too.

    Raises:
        ValueError: the file is not a safetensors file written by ``sasa train``, its facts have the wrong type, or its
            weights don't fit the network or contain NaN or infinity.
        FileNotFoundError: there is no such file.
    """
    path = find_weights(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = {name: json.loads(fact) for name, fact in (file.metadata() or {}).items() if name != "format"}
        if facts.get("model") in DETECTORS and not detectors:
            raise ValueError("expected a classifier, got a detector, which sasa eval and sasa predict take")
        _check_facts(facts)
        network = _build(facts)
        weights = load_file(path)
        network.load_state_dict(weights)
    except (SafetensorError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"path: {path} does not hold weights written by sasa train: {error}") from error
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"path: expected finite weights in {path}, got NaN or infinity in {name}")
    return network.eval(), facts


def _build(facts: dict[str, Any]) -> nn.Module:
    if facts["model"] in DETECTORS:
        from .task import task_of  # imports Lightning

        return task_of(facts["model"]).build(facts)
    return create_model(facts["model"], len(facts["classes"]), facts["in_chans"], **facts["model_options"])


def _check_facts(facts: dict[str, Any]) -> None:
    """Raise ValueError unless every fact is present and has a plausible type and range."""
    facts.setdefault("model_options", {})
    facts.setdefault("crop_pct", 1.0)

    def channels(values: Any) -> bool:
        return isinstance(values, list) and len(values) == facts["in_chans"] and all(map(_finite, values))

    def names(values: Any) -> bool:
        return isinstance(values, list) and bool(values) and all(isinstance(name, str) for name in values)

    expected: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "model": ("the name of a network", lambda value: value in (*MODELS, *DETECTORS)),
        "model_options": ("a dict of the network's arguments", lambda value: isinstance(value, dict)),
        "classes": ("a list of names", names),
        "in_chans": ("1 or 3", lambda value: type(value) is int and value in (1, 3)),
        "image_size": (f"an int from 1 to {LARGEST}", lambda value: type(value) is int and 1 <= value <= LARGEST),
        "crop_pct": ("more than 0 and at most 1", lambda value: _finite(value) and 0 < value <= 1),
        "mean": ("a finite number for each channel", channels),
        "std": ("a number above 0 for each channel", lambda value: channels(value) and min(value) > 0),
    }
    if facts.get("model") in DETECTORS:
        facts.setdefault("train_sizes", [])
        expected["category_ids"] = ("a whole number for each class", lambda value: _ids(value, facts["classes"]))
        expected["train_sizes"] = ("a list of sides", lambda value: all(map(expected["image_size"][1], value)))
        expected["in_chans"] = ("3", lambda value: value == 3)
    for name, (what, right) in expected.items():
        if name not in facts:
            raise ValueError(f"{name!r} is missing, expected {what}")
        if not right(facts[name]):
            raise ValueError(f"{name}: expected {what}, got {str(facts[name])[:200]}")


def _ids(values: Any, classes: list[str]) -> bool:
    return isinstance(values, list) and len(set(values)) == len(classes) and all(type(one) is int for one in values)


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < sys.float_info.max
