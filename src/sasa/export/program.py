"""Networks as programs of ``torch.export``, and as packages compiled by AOTInductor."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import compile_package
from .._files import write_whole
from .prepare import as_text, beside, checked, exported, with_implementation

FACTS = "sasa.json"
"""Name of the metadata inside a program: ``torch.export.load(path, extra_files={"sasa.json": ""})`` reads it."""


def to_program(
    model: nn.Module,
    example: Tensor,
    path: str | os.PathLike[str],
    *,
    dynamic: bool = True,
    implementation: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a network as a program that ``torch.export.load`` reads.

    Args:
        model: a layer or a network with such layers, in evaluation mode.
        example: images (B, C, H, W) that the model takes, on its device; their values don't matter.
        path: file to write, ``.pt2`` by convention; it is complete or absent.
        dynamic: whether batch, height and width may vary when the program is run.
        implementation: of the attention. None keeps the model's: the program calls sasa's operators, and loads only
            where sasa is imported. ``"reference"``: plain PyTorch operations, slower, that load everywhere.
        metadata: facts to store in the file, as JSON in its extra file ``sasa.json``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the model is in training mode, it rejects the example, there is no implementation of that name, or
            the network's code depends on the image size with ``dynamic=True``.
        OSError: the path can't be written to.
    """
    model = with_implementation(model, implementation)
    facts = as_text(metadata)
    path = checked(model, example, path, dynamic)
    program, buffer = exported(model, example, dynamic), io.BytesIO()
    torch.export.save(program, buffer, extra_files={FACTS: json.dumps(facts)})
    write_whole(path, buffer.getbuffer())


def to_aoti(
    model: nn.Module,
    example: Tensor,
    path: str | os.PathLike[str],
    *,
    dynamic: bool = True,
    implementation: str | None = "reference",
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Compile a network to a package of machine code for this kind of machine (AOTInductor). Needs a C++ compiler.

    ``torch._inductor.aoti_load_package`` runs it in Python, ``torch::inductor::AOTIModelPackageLoader`` in C++.

    Args:
        model: a layer or a network with such layers, in evaluation mode.
        example: images (B, C, H, W) that the model takes, on its device; their values don't matter.
        path: file to write, which must end in ``.pt2``; it is complete or absent.
        dynamic: whether batch, height and width may vary when the package is run.
        implementation: of the attention. ``"reference"`` is compiled into the package. None keeps the model's: the
            package calls sasa's operators, which exist in Python once sasa is imported, but not in a C++ program.
        metadata: facts to store in the package, as text.

    Raises:
        TypeError, ValueError, OSError: as :func:`to_program`; also ValueError for a path that doesn't end in ``.pt2``.
    """
    model = with_implementation(model, implementation)
    facts = as_text(metadata)
    path = checked(model, example, path, dynamic)
    if path.suffix != ".pt2":
        raise ValueError(f"path: expected a name that ends in .pt2, got {path.name}")
    program = exported(model, example, dynamic)
    with beside(path) as part:
        compile_package(program, str(part), facts)
