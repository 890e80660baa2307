"""What all exports have in common: checks, dynamic sizes, metadata, and files that are either complete or absent."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .._compat import size_is_bound
from ..ops import checks

AXES = {0: "batch", 2: "height", 3: "width"}


def checked(model: nn.Module, example: Tensor, path: str | os.PathLike[str], dynamic: bool) -> Path:
    """The path; raises as :func:`sasa.export.to_onnx` unless these can be exported."""
    checks.flag("dynamic", dynamic)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        raise TypeError(f"model: expected the network as it was written, got a {type(model).__name__}")
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"model: expected evaluation mode, model.eval(), got {training[0]} in training mode")
    if not isinstance(example, Tensor):
        raise TypeError(f"example: expected a Tensor, got {type(example).__name__}")
    if example.dim() != 4 or 0 in example.shape:
        raise ValueError(f"example: expected images (batch, channels, height, width), got {tuple(example.shape)}")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a path, got {type(path).__name__}")
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"path: expected a file to write, got the folder {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: expected a file in a folder that is there, got {path}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"path: expected a folder that can be written to, got {path.parent}")
    with torch.no_grad():
        model(example)  # raises the network's own error if the example doesn't fit
    return path


def two_or_more(example: Tensor) -> Tensor:
    """The example as at least two images: PyTorch treats a size of 1 as a constant."""
    return example if example.shape[0] > 1 else example.repeat(2, 1, 1, 1)


def as_text(metadata: Mapping[str, Any] | None) -> dict[str, str]:
    """Each fact as JSON, text unchanged; raises TypeError for what JSON can't represent."""
    found = {}
    for name, fact in (metadata or {}).items():
        try:
            found[name] = fact if isinstance(fact, str) else json.dumps(fact)
        except (TypeError, ValueError) as error:
            raise TypeError(f"metadata: expected what JSON can hold for {name!r}, got {type(fact).__name__}") from error
        if not isinstance(name, str):
            raise TypeError(f"metadata: expected names that are text, got {name!r}")
    return found


def exported(model: nn.Module, example: Tensor, dynamic: bool) -> ExportedProgram:
    """The network as a program.

    Raises:
        ValueError: its code depends on a size that should be dynamic.
    """
    try:
        with torch.no_grad():
            if not dynamic:
                return torch.export.export(model, (example,), strict=False)
            shapes = (dict.fromkeys(AXES, Dim.DYNAMIC),)
            return torch.export.export(model, (two_or_more(example),), dynamic_shapes=shapes, strict=False)
    except size_is_bound() as error:
        raise size_error(error) from error


def size_error(error: BaseException) -> ValueError:
    """The error for a network whose code depends on the size of its images."""
    line = next((line.strip() for line in str(error).splitlines() if "size" in line or "specializ" in line), str(error))
    return ValueError(
        "dynamic: expected False for this network, whose code is bound to the size of its images or batches, "
        f"got True ({line[:200]})"
    )


def with_implementation(model: nn.Module, name: str | None) -> nn.Module:
    """A copy whose attention uses that implementation; the model itself for None."""
    checks.implementation(name)
    if name is None:
        return model
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module).__module__.startswith("sasa.") and hasattr(module, "implementation"):
            module.implementation = name  # type: ignore[assignment]
    return model


@contextlib.contextmanager
def beside(path: Path) -> Any:
    """A temporary path to write to, which is renamed to ``path`` on success and removed on failure."""
    part = path.with_name(f".{path.name}.part{path.suffix}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
