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
"""The lowest and the highest supported opset version."""


def onnx_translations() -> dict[Callable, Callable]:
    """ONNX translations of sasa's operators, for ``torch.onnx.export(..., dynamo=True, custom_translation_table=...)``.

    PyTorch's exporter needs no table: it finds these once sasa is imported. The table is for other exporters.

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
    """Write a network as an ONNX file, using only standard operators that every runtime supports.

    An attention layer becomes one Scan over strips of the image and a few nodes around it, in memory that is linear in
    the pixels. Half precision is computed in float32 and rounded once. The input is called ``images``, the output
    ``output`` (or ``output_0``, ``output_1``, …).

    Args:
        model: a layer or a network with such layers, in evaluation mode.
        example: images (B, C, H, W) that the model accepts, on its device; their values don't matter.
        path: file to write; it is either complete or absent, and an earlier one is kept if something fails.
        dynamic: whether batch, height and width may vary when the file is run.
        metadata: facts to store in the file's ``metadata_props``: text unchanged, everything else as JSON.
        opset: version of ONNX's operators, 18 to 23.
        optimize: whether PyTorch's exporter simplifies the graph. That takes minutes if many attention layers are
            called, as in detectors; runtimes simplify it again when they load it.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the model is in training mode, a layer has the border ``"shift"``, the model rejects the example,
            the opset is out of range, the network's code depends on the image size with ``dynamic=True``, or the
            network is larger than 2 GB.
        OSError: the path can't be written to.
        ImportError: onnx or onnxscript is not installed; both come with the extra ``export``.
    """
    onnx_translations()
    if type(opset) is not int or not OPSETS[0] <= opset <= OPSETS[1]:
        raise ValueError(f"opset: expected an int from {OPSETS[0]} to {OPSETS[1]}, got {opset!r}")
    facts = as_text(metadata)
    path = checked(model, example, path, dynamic)
    layers = [(name or type(layer).__name__, getattr(layer, "border", None)) for name, layer in model.named_modules()]
    moved = [name for name, border in layers if border == "shift"]
    if moved:
        raise ValueError(f"model: border='shift' can't be exported to ONNX, got {moved[0]} with it")
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
    written = program.model.graph.opset_imports.get("")
    if written != opset:  # the exporter keeps its own version if it can't convert
        raise ValueError(f"opset: this network can't be converted to version {opset}, only written in {written}")
    outputs = program.model.graph.outputs
    for index, output in enumerate(outputs):
        output.name = "output" if len(outputs) == 1 else f"output_{index}"
    program.model.metadata_props.update(facts)
    try:
        content = program.model_proto.SerializeToString()
    except Exception as error:  # protobuf's own, of several kinds
        raise ValueError(f"model: expected less than 2 GB, which is what an ONNX file holds: {error}") from error
    write_whole(path, content)
