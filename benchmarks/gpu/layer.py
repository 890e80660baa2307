"""The whole layer, projections included, beside a 3x3 convolution by cuDNN and timm's HaloAttn.

Training is forward and backward with gradients of the input and of all parameters. The convolution and HaloAttn compute
something else, so only the layer's own results are checked.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import sasa

from ..layer import CONVOLUTION, HALO, halo, wants_channels_last
from ..measure import Call, call_of, largest_difference
from ..problems import LAYERS, LayerProblem
from .attention import MODES
from .clock import Pace
from .plan import REST, SHAPES, TARGET, Case, Setting
from .precision import PRECISIONS

PACE = Pace(20, 5, 4)
OURS = "sasa"
# A layer in every stage of a ResNet-50, for 64 images.
STAGES = {
    f"{size}x{size}, {width} channels": LayerProblem(64, width, width, size, 7, 8)
    for width, size in ((64, 56), (128, 28), (256, 14), (512, 7))
}


def cases(quick: bool) -> list[Case]:
    """The notebook's layer and one in every stage of a ResNet-50."""

    def each(shape: str, problem: LayerProblem, precision: str, peers: tuple[str, ...], rank: int) -> list[Case]:
        return [Case("layer", f"{shape} {precision} {mode}", mode, precision, problem, peers, rank) for mode in MODES]

    if quick:
        small = LAYERS["small"]._replace(size=8, kernel_size=3)
        return each("small", small, "bfloat16", (OURS, CONVOLUTION, HALO), TARGET)
    notebook = LAYERS["notebook"]
    found = each("notebook", notebook, "bfloat16", (OURS, CONVOLUTION, HALO), TARGET)
    for precision in ("bfloat16", "float32"):
        for name, problem in STAGES.items():
            found += each(name, problem, precision, (OURS, CONVOLUTION), SHAPES)
    for precision in ("float32", "tf32"):
        found += each("notebook", notebook, precision, (OURS, CONVOLUTION), SHAPES)
        found += each("notebook", notebook, precision, (HALO,), REST)
    for precision in ("bfloat16", "float32"):
        for name, problem in STAGES.items():
            found += each(name, problem, precision, (HALO,), REST)
    return found


def baseline(case: Case, peer: str) -> str:
    """Our layer."""
    return OURS


def compiles(case: Case, peer: str) -> bool:
    """Nothing here does."""
    return False


def layer_of(case: Case, peer: str, setting: Setting) -> nn.Module:
    """A fresh layer."""
    torch.manual_seed(0)
    problem: LayerProblem = case.problem
    channels = problem.in_channels, problem.out_channels
    layer: nn.Module
    if peer == CONVOLUTION:
        layer = nn.Conv2d(*channels, 3, padding=1)
    elif peer == HALO:
        layer = halo(problem)
    else:
        sizes = problem.kernel_size, problem.num_heads
        layer = sasa.RelativeSelfAttention(*channels, *sizes, implementation=setting.implementation)
    layer = layer.to(setting.device, PRECISIONS[case.precision].dtype)
    return layer.to(memory_format=torch.channels_last) if wants_channels_last(peer) else layer


def inputs(case: Case, setting: Setting, channels_last: bool) -> tuple[Tensor, Tensor]:
    """An input, and a gradient of the output."""
    torch.manual_seed(1)
    problem: LayerProblem = case.problem
    made = (
        torch.randn(problem.batch, channels, problem.size, problem.size, device=setting.device)
        for channels in (problem.in_channels, problem.out_channels)
    )
    format_ = torch.channels_last if channels_last else torch.contiguous_format
    x, grad = (tensor.to(PRECISIONS[case.precision].dtype).contiguous(memory_format=format_) for tensor in made)
    return x, grad


def build(case: Case, peer: str, setting: Setting) -> Call:
    """Output, and in training the gradients of the input and of the parameters."""
    layer = layer_of(case, peer, setting)
    x, grad = inputs(case, setting, wants_channels_last(peer))
    training = case.mode == "training"
    x.requires_grad_(training)
    return call_of(lambda: layer(x), case.mode, [x, *layer.parameters()], grad if training else None)


def check(case: Case, peer: str, call: Call, setting: Setting) -> float | None:
    """Output and input's gradient against plain PyTorch in float64, of the same weights and input."""
    if peer != OURS:
        return None
    precision = PRECISIONS[case.precision]
    layer = copy.deepcopy(layer_of(case, peer, setting)).double()
    layer.implementation = "eager"
    x, grad = (tensor.double() for tensor in inputs(case, setting, channels_last=False))
    x.requires_grad_(case.mode == "training")
    expected = call_of(lambda: layer(x), case.mode, [x], grad)()
    return largest_difference(call()[: len(expected)], expected, precision.dtype, precision.tolerance)


def figures(case: Case, peer: str, found: dict[str, Any], machine: dict[str, Any]) -> dict[str, float]:
    """Nothing more than time and memory."""
    return {}
