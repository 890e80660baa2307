"""Exported layers and networks compared with PyTorch's eager mode: part export, on a CPU, in float32.

A layer and a network, for one image. ``onnx`` is what ``sasa.export.to_onnx`` writes, run by
onnxruntime on as many threads; ``onnx, equation`` is the same layer as a pass over the image for each tap: what the
exporter generates from the equation's shifted slices. ``program`` calls sasa's operators, ``program, equation`` plain
operations; ``aoti`` is the equation compiled. Sizes vary in all of them.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import sasa

from .cases import Case, Device, Pace, Part, RefusedError
from .networks import network_of
from .verify import Call, largest_difference

FORMS = ("sasa", "onnx", "onnx, equation", "program", "program, equation", "aoti")
NETWORK = "sasa_resnet26_convstem"
TOLERANCE = 1e-3


class ExportProblem(NamedTuple):
    """Images for the notebook's layer (64 to 128 channels, 7x7 window, 8 heads) or for a network."""

    batch: int
    size: int
    network: str = ""

    def tiny(self) -> ExportProblem:
        """What is checked."""
        return self._replace(batch=2, size=64 if self.network else 12)

    @property
    def channels(self) -> int:
        """Of the images."""
        return 3 if self.network else 64

    def model(self) -> nn.Module:
        """With fresh parameters, in evaluation mode."""
        if self.network:
            return network_of(self.network).eval()
        torch.manual_seed(0)
        return sasa.RelativeSelfAttention(64, 128, 7, 8).eval()

    def images(self) -> Tensor:
        """Random ones."""
        torch.manual_seed(1)
        return torch.randn(self.batch, self.channels, self.size, self.size)


def cases(device: Device) -> list[Case]:
    """On a CPU alone."""
    if not device.on_cpu:
        return []
    if device.quick:
        return [Case("export", "layer, batch 1", "forward", ExportProblem(1, 9), FORMS[:3])]
    layer = Case("export", "layer, batch 1", "forward", ExportProblem(1, 56), FORMS)
    network = Case(
        "export", f"{NETWORK}, batch 1", "forward", ExportProblem(1, 224, NETWORK), ("sasa", "onnx", "program")
    )
    return [layer, network]


@functools.cache
def runner(network: str, form: str) -> Callable[[Tensor], Tensor]:
    """A function that runs the exported model on images; one works for all sizes."""
    import sasa.export

    problem = ExportProblem(2, 64 if network else 12, network)
    model, example = problem.model(), problem.images()
    kind, _, equation = form.partition(", ")
    implementation = "reference" if equation else None
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.pt2")
        if kind == "onnx":
            if implementation:
                model.implementation = implementation  # type: ignore[assignment]
            sasa.export.to_onnx(model, example, path)
            return _in_onnxruntime(path)
        if kind == "program":
            sasa.export.to_program(model, example, path, implementation=implementation)
            return torch.export.load(path).module()
        sasa.export.to_aoti(model, example, path)
        return torch._inductor.aoti_load_package(path)


def _in_onnxruntime(path: str) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # its threads would otherwise wait busily, beside the peers that take turns with it
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options)
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def build(case: Case, peer: str, device: Device) -> Call:
    """Outputs."""
    problem = case.problem
    if peer == "aoti" and device.quick:
        raise RefusedError("nothing is compiled in --quick")
    function = problem.model() if peer == "sasa" else runner(problem.network, peer)
    x = problem.images()

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(x),)

    return forward


def check(case: Case, peer: str, call: Call, device: Device) -> float | None:
    """Against the equation in float64."""
    right = case.problem.model().double()
    for module in right.modules():
        if hasattr(module, "implementation"):
            module.implementation = "reference"  # type: ignore[assignment]
    with torch.no_grad():
        return largest_difference(call(), [right(case.problem.images().double())], TOLERANCE)


def compiles(case: Case, peer: str) -> bool:
    """Exporting takes seconds, compiling a minute."""
    return peer == "aoti"


PART = Part(cases, build, check, compiles=compiles, cpu_pace=Pace(0.1, 5, 5))
