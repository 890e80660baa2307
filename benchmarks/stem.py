"""Stems of a ResNet: part stem.

The paper's attention stem compared with what it replaces: a 7x7 convolution of stride 2, batch norm, ReLU, and a 3x3
max pool of stride 2. Both turn images of 224x224 into 64 channels of 56x56. Training is forward and backward with
gradients of all parameters, with the batch's own statistics; no network needs the image's gradient. Forward is in
evaluation. On a GPU under autocast to bfloat16, with parameters in float32, as networks are trained.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sasa

from .cases import MODES, PRECISIONS, REST, TARGET, Case, Device, Part
from .verify import Call, call_of, largest_difference

CONVOLUTION_STEM = "convolution stem"
OURS = "sasa"
CHECKED = 8  # images; the reference in float64 would not fit into a GPU's memory with more


class StemProblem(NamedTuple):
    """Square images of three channels."""

    batch: int
    size: int
    channels: int = 64

    def tiny(self) -> StemProblem:
        """One small image."""
        return self._replace(batch=1, size=min(self.size, 24))


def cases(device: Device) -> list[Case]:
    """Batches of 8 and one image; on a GPU, of 128."""
    if device.quick:
        chosen = {"small": StemProblem(1, 16, 8)}
    elif device.on_cpu:
        chosen = {"batch 8": StemProblem(8, 224), "batch 1": StemProblem(1, 224)}
    else:
        chosen = {"batch 128": StemProblem(128, 224)}
    peers = OURS, CONVOLUTION_STEM
    precision, rank = ("float32", REST) if device.on_cpu else ("bfloat16", TARGET)
    return [
        Case("stem", f"{name} {mode}", mode, problem, peers, precision, rank)
        for name, problem in chosen.items()
        for mode in MODES
    ]


def stem_of(case: Case, peer: str, device: Device) -> nn.Module:
    """A stem with its own weights."""
    torch.manual_seed(0)
    channels = case.problem.channels
    stem: Any = sasa.AttentionStem(3, channels)
    if peer == CONVOLUTION_STEM:
        convolution = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        stem = nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    stem.train(case.mode == "training")
    if peer == OURS:
        stem.implementation = device.implementation
    return stem.to(device.name, memory_format=torch.channels_last)


def inputs(case: Case, device: Device) -> tuple[Tensor, Tensor]:
    """Images, and a gradient of the output, channels_last."""
    torch.manual_seed(1)
    problem = case.problem
    small = problem.size // 4
    x = torch.randn(problem.batch, 3, problem.size, problem.size, device=device.name)
    grad = torch.randn(problem.batch, problem.channels, small, small, device=device.name)
    grad = grad.to(PRECISIONS[case.precision].dtype)
    return x.contiguous(memory_format=torch.channels_last), grad.contiguous(memory_format=torch.channels_last)


def build(case: Case, peer: str, device: Device) -> Call:
    """Output, and in training the gradients of the parameters."""
    stem = stem_of(case, peer, device)
    x, grad = inputs(case, device)
    dtype = PRECISIONS[case.precision].dtype

    def output() -> Tensor:
        with torch.autocast(device.name, dtype, enabled=dtype != torch.float32):
            return stem(x)

    return call_of(output, case.mode, list(stem.parameters()), grad)


def check(case: Case, peer: str, call: Call, device: Device) -> float | None:
    """Output and gradients against the stem in plain PyTorch in float64, of the same images: rounding them to bfloat16
    changes which pixel is the largest of a block.
    """
    if peer != OURS:
        return None
    if case.problem.batch > CHECKED:
        case = replace(case, problem=case.problem._replace(batch=CHECKED))
        call = build(case, peer, device)
    right: Any = stem_of(case, peer, device).double()
    right.implementation = "reference" if device.on_cpu else "eager"
    x, grad = (tensor.to(PRECISIONS[case.precision].dtype).double() for tensor in inputs(case, device))
    expected = call_of(lambda: right(x), case.mode, list(right.parameters()), grad)()
    return largest_difference(call(), expected, PRECISIONS[case.precision].tolerance)


PART = Part(cases, build, check, baseline=lambda peer: CONVOLUTION_STEM)
