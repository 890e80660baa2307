"""Converted networks on disk: weights as safetensors, and the conversions that led to them as JSON."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from .._extras import require
from .convert import CONVERSIONS, convert

Model = TypeVar("Model", bound=nn.Module)

WEIGHTS, SETTINGS = "model.safetensors", "conversion.json"


def save_converted(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a converted network: ``model.safetensors`` and ``conversion.json``, for :func:`load_converted`.

    The first holds the parameters and buffers, the second what :func:`sasa.convert` was called with and which modules
    it replaced. Files of an earlier call are replaced.

    Args:
        model: a network returned by :func:`sasa.convert`, or one that contains such networks; it may be wrapped in
            ``DistributedDataParallel`` or compiled.
        folder: where to write; created if it doesn't exist.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: nothing in ``model`` was converted.
        ImportError: safetensors is not installed; it comes with the extra ``models``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    model = _unwrapped(model)
    conversions = [
        {"module": name} | settings
        for name, module in model.named_modules()
        for settings in vars(module).get(CONVERSIONS, ())
    ]
    if not conversions:
        raise ValueError(f"model: expected a network that sasa.convert gave, got {type(model).__name__} without any")
    safetensors = require("safetensors.torch", extra="models")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Each file is either complete or absent, even if this is interrupted.
    safetensors.save_model(model, str(folder / f"{WEIGHTS}.part"), metadata={"format": "pt"})
    text = json.dumps({"conversions": conversions}, indent=1, default=lambda number: number.item())  # NumPy's
    (folder / f"{SETTINGS}.part").write_text(f"{text}\n")
    for name in (SETTINGS, WEIGHTS):
        (folder / f"{name}.part").replace(folder / name)


def load_converted(model: Model, folder: str | os.PathLike[str]) -> Model:
    """The network that :func:`save_converted` wrote to ``folder``: ``model`` converted likewise, with those weights.

    Args:
        model: the network as it was before conversion: of the same class and sizes, with any weights. It is left
            unchanged; a copy is converted.
        folder: with ``model.safetensors`` and ``conversion.json``. Neither can run code.

    Returns:
        The converted network, on the device, in the dtype and the mode (training or evaluation) of ``model``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: ``model`` is another network than the one that was converted (the message names what differs), or a
            file is damaged.
        ImportError: safetensors is not installed; it comes with the extra ``models``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    safetensors = require("safetensors", extra="models")
    folder = Path(folder)
    conversions = _read(folder / SETTINGS)
    converted = copy.deepcopy(model)
    for settings in conversions:
        converted = _convert_again(converted, **settings)
    try:
        with safetensors.safe_open(str(folder / WEIGHTS), framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        _compare(converted, shapes)
        require("safetensors.torch", extra="models").load_model(converted, str(folder / WEIGHTS))
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ValueError(f"folder: {folder / WEIGHTS} does not hold the weights of this network: {error}") from error
    return converted


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # as returned by torch.compile
            model = inner
        else:
            return model


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        conversions = json.loads(path.read_text())["conversions"]
        good = all(
            isinstance(c["module"], str)
            and isinstance(c["arguments"], dict)
            and all(isinstance(n, str) for n in c["names"])
            for c in conversions
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"folder: {path} was not written by sasa.save_converted: {error!r}") from error
    if not good:
        raise ValueError(f"folder: {path} was not written by sasa.save_converted")
    return conversions


def _convert_again(model: Model, module: str, arguments: dict[str, Any], names: list[str]) -> Model:
    """A network with one of its modules converted as recorded."""
    modules = dict(model.named_modules())
    wanted = [".".join(filter(None, (module, name))) for name in names]
    missing = [name for name in wanted if not isinstance(modules.get(name), nn.Conv2d)]
    if missing:
        name = missing[0]
        found = f"{type(modules[name]).__name__} there" if name in modules else "no module of that name"
        raise ValueError(f"model: expected the network before its conversion, with a convolution {name!r}, got {found}")
    chosen = set(names)
    try:
        part = convert(modules[module], where=lambda name, _: name in chosen, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: can't be converted as the saved network was: {error}") from error
    if not module:
        return part
    parent, _, name = module.rpartition(".")
    setattr(modules[parent], name, part)
    return model


def _compare(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the weights on disk are those of the network; tied ones are stored once."""
    state = model.state_dict(keep_vars=True)
    stored = {id(state[name]) for name in shapes if name in state}
    wrong = [
        f"{name} of {tuple(tensor.shape)}, the file has {shapes.get(name, 'none')}"
        for name, tensor in state.items()
        if (shapes[name] != tuple(tensor.shape) if name in shapes else id(tensor) not in stored)
    ]
    wrong += [f"no {name}, the file has one of {shape}" for name, shape in shapes.items() if name not in state]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"model: expected the network that was saved, got one with {'; '.join(wrong[:3])}{more}")
