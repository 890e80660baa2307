"""The command that exports trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from ..train.command import run_function
from ..train.errors import DataError, OptionError, OutputError
from .folding import fold_batch_norms
from .onnx import to_onnx
from .program import to_aoti, to_program

FACTS = ("model", "classes", "mean", "std", "image_size", "crop_pct", "in_chans")


def export(program: str, arguments: list[str]) -> int:
    """``sasa export``: trained weights to a file for other runtimes."""
    return run_function(program, export_weights, arguments, positional=("weights",))


def export_weights(
    weights: Path,
    to: Literal["onnx", "program", "aoti"],
    out: Path,
    dynamic: bool = True,
    half: bool = False,
    implementation: str | None = None,
) -> None:
    """Export a trained network with the metadata needed to use it: classes, mean, std and size of the images.

    Args:
        weights: model.safetensors of a run of sasa train, or the name of packaged weights
        to: onnx; program, for torch.export.load; or aoti, a package compiled for this kind of machine
        out: file to write
        dynamic: let batch, height and width vary
        half: parameters and images in float16
        implementation: of the attention in programs and packages; with reference they run without sasa

    Raises:
        DataError: weights can't be read.
        OptionError: an option is out of range, or the network can't be exported that way.
        OutputError: out can't be written to.
    """
    from ..train.evaluate import trained

    if to not in ("onnx", "program", "aoti"):
        raise OptionError(f"to: expected onnx, program or aoti, got {to!r}")
    if to == "onnx" and implementation is not None:
        raise OptionError(f"implementation: expected none with --to onnx, got {implementation!r}")
    network, facts = trained(weights)
    network = fold_batch_norms(network)
    size = facts["image_size"]
    example = torch.zeros(2, facts["in_chans"], size, size)
    if half:
        network, example = network.half(), example.half()
    metadata = {name: facts[name] for name in FACTS}
    try:
        if to == "onnx":
            to_onnx(network, example, out, dynamic=dynamic, metadata=metadata)
        elif to == "program":
            to_program(network, example, out, dynamic=dynamic, implementation=implementation, metadata=metadata)
        else:
            chosen = implementation or "reference"
            to_aoti(network, example, out, dynamic=dynamic, implementation=chosen, metadata=metadata)
    except OSError as error:
        raise OutputError(f"out: {error}") from error
    except (ImportError, ValueError) as error:
        raise (OptionError if isinstance(error, ValueError) else DataError)(str(error)) from error
