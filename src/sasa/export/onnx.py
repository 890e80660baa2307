"""Networks as ONNX files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import size_is_bound
from .._extras import check_installed, require
from .._files import write_whole
from ..ops import checks
from .prepare import AXES, as_text, checked, size_error, two_or_more

OPSETS = (18, 23)
"""The lowest and the highest version of ONNX's operators that can be asked for."""


def onnx_translations() -> dict[Callable, Callable]:
    """What sasa's operators are in ONNX, for ``torch.onnx.export(..., dynamo=True, custom_translation_table=...)``.

    PyTorch's exporter needs no table: it finds these where sasa was imported. The table is for other exporters.

    Raises:
        ImportError: onnx or onnxscript is not installed; both come with the extra ``export``.
    """
    check_installed(("onnx", "onnxscript"), "export")
    return dict(require("sasa.export.operators", "export").TRANSLATIONS)


def to_onnx(
    model: nn.Module,
    example: Tensor,
    path: str | os.PathLike[str],
    *,
    dynamic: bool = True,
    metadata: Mapping[str, Any] | None = None,
    opset: int = 18,
    optimize: bool = True,
) -> None:
    """Write a network as an ONNX file, of standard operators that every runtime has.

    An attention layer becomes one Scan over strips of the image and a few nodes around it, in memory that is linear in
    the pixels. Half precision is computed in float32 and rounded once. The input is called ``images``, the output
    ``output`` (or ``output_0``, ``output_1``, …).

    Args:
        model: a layer or a network with such layers, in evaluation mode.
        example: images (B, C, H, W) that the model takes, on its device; their values don't matter.
        path: file to write; it is complete or absent, and an earlier one stays if something fails.
        dynamic: whether batch, height and width may be others when the file is run.
        metadata: facts to keep in the file's ``metadata_props``: text as it is, all else as JSON.
        opset: version of ONNX's operators, 18 to 23.
        optimize: whether PyTorch's exporter simplifies the graph. That takes minutes where many attention layers are
            called, as in detectors; runtimes simplify it again when they load it.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a model in training mode, an example that the model doesn't take, an opset out of range, a network
            whose code depends on its image's size with ``dynamic=True``, or one of more than 2 GB.
        OSError: the path can't be written to.
        ImportError: onnx or onnxscript is not installed; both come with the extra ``export``.
    """
    onnx_translations()
    if type(opset) is not int or not OPSETS[0] <= opset <= OPSETS[1]:
        raise ValueError(f"opset: expected an int from {OPSETS[0]} to {OPSETS[1]}, got {opset!r}")
    facts = as_text(metadata)
    path = checked(model, example, path, dynamic)
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                model,
                (two_or_more(example) if dynamic else example,),
                dynamo=True,
                dynamic_shapes=(AXES,) if dynamic else None,
                input_names=["images"],
                opset_version=opset,
                optimize=checks.flag("optimize", optimize),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = error.__cause__ or error
        if isinstance(cause, size_is_bound()) or "Dim.DYNAMIC" in str(cause):
            raise size_error(cause) from error
        raise ValueError(f"model: can't be exported to ONNX: {cause}") from error
    if program is None:
        raise ValueError("model: can't be exported to ONNX")
    outputs = program.model.graph.outputs
    for index, output in enumerate(outputs):
        output.name = "output" if len(outputs) == 1 else f"output_{index}"
    program.model.metadata_props.update(facts)
    try:
        content = program.model_proto.SerializeToString()
    except Exception as error:  # protobuf's own, of several kinds
        raise ValueError(f"model: expected less than 2 GB, which is what an ONNX file holds: {error}") from error
    write_whole(path, content)
