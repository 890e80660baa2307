"""Whole layers: parts layer, kept and calls.

layer: projections included, compared with other implementations of such a layer and with a 3x3 convolution. kept: a
convolution, and attention that starts as that convolution. calls: the cost of a call on one thread when there is next
to nothing to compute. Training is forward and backward with gradients of the input and of all parameters, as inside a
network. The convolution and HaloAttn compute something else than the layer: they are not checked.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

import sasa

from .cases import CONVOLUTION, MODES, PRECISIONS, REST, SHAPES, Case, Device, Pace, Part
from .peers import UnfoldSelfAttention
from .problems import LAYER_STAGES, LAYERS, LayerProblem
from .verify import Call, call_of, largest_difference

BFLOAT16 = " bfloat16"  # suffix of names that run in it whatever the case's precision
HALO = "timm HaloAttn"
OURS = ("sasa", "sasa recompute")

KEPT = {
    "16 channels": LayerProblem(32, 16, 16, 32, 3, 9),
    "64 channels": LayerProblem(8, 64, 64, 56, 3, 9),
    "256 channels": LayerProblem(8, 256, 256, 14, 3, 9),
    "512 channels": LayerProblem(8, 512, 512, 7, 3, 9),
    "depthwise": LayerProblem(8, 96, 96, 28, 3, 9, groups=96),
}


def cases(device: Device) -> list[Case]:
    """The notebook's layer; on a CPU one of a ResNet-50's last stage, on a GPU one of every stage, for 64 images."""
    if device.quick:
        every = (*OURS, CONVOLUTION, "sasa bfloat16", "convolution 3x3 bfloat16", HALO, "unfold")
        return [Case("layer", f"small {mode}", mode, LAYERS["small"], every) for mode in MODES]
    if not device.on_cpu:
        chosen = [("notebook", LAYERS["notebook"], "bfloat16", ("sasa", CONVOLUTION, HALO), 0)]
        for precision in ("bfloat16", "float32", "tf32"):
            if precision != "bfloat16":
                chosen.append(("notebook", LAYERS["notebook"], precision, ("sasa", CONVOLUTION), SHAPES))
                chosen.append(("notebook", LAYERS["notebook"], precision, (HALO,), REST))
            for name, problem in LAYER_STAGES.items() if precision != "tf32" else ():
                chosen.append((name, problem, precision, ("sasa", CONVOLUTION), SHAPES))
                chosen.append((name, problem, precision, (HALO,), REST))
        return [
            Case("layer", f"{name} {precision} {mode}", mode, problem, peers, precision, rank)
            for name, problem, precision, peers, rank in chosen
            for mode in MODES
        ]
    peers = (*OURS, CONVOLUTION, HALO, "unfold")
    by_case = {
        ("notebook", "forward"): (*OURS, CONVOLUTION, "sasa bfloat16", "convolution 3x3 bfloat16", HALO, "unfold"),
        ("notebook", "training"): peers[:-1],  # unfold's backward does not fit in memory
        ("notebook-batch8", "training"): peers,
        ("stage4", "forward"): peers,
        ("stage4", "training"): peers,
    }
    return [Case("layer", f"{name} {mode}", mode, LAYERS[name], peers) for (name, mode), peers in by_case.items()]


def kept_cases(device: Device) -> list[Case]:
    """3x3 convolutions of a ResNet's shapes."""
    chosen = {"small": LayerProblem(2, 8, 8, 8, 3, 9)} if device.quick else KEPT
    return [
        Case("kept", f"{name} {mode}", mode, problem, ("sasa", CONVOLUTION), rank=REST)
        for name, problem in chosen.items()
        for mode in MODES
    ]


def call_cases(device: Device) -> list[Case]:
    """Images of 2x2 pixels, by layers whose heads fill vectors and don't."""
    peers = (CONVOLUTION, "sasa, 8 heads", "sasa, 2 heads")
    names = {"forward": "forward", "training": "forward and backward"}
    problem = LayerProblem(1, 8, 8, 2, 3, 8)
    return [Case("calls", names[mode], mode, problem, peers, threads=1) for mode in MODES] if device.on_cpu else []


def dtype_of(case: Case, peer: str) -> torch.dtype:
    """What a layer of this name computes in."""
    return torch.bfloat16 if peer.endswith(BFLOAT16) else PRECISIONS[case.precision].dtype


def layer_of(case: Case, peer: str, device: Device) -> nn.Module:
    """A layer for the problem; sasa and unfold have the same weights, HaloAttn and the convolution their own."""
    torch.manual_seed(0)
    problem: LayerProblem = case.problem
    kind, channels = peer.removesuffix(BFLOAT16), (problem.in_channels, problem.out_channels)
    layer: Any
    if kind == CONVOLUTION or case.part == "kept":
        layer = nn.Conv2d(*channels, 3, padding=1, groups=problem.groups, bias=case.part != "kept")
        layer = sasa.AttentionConv2d(layer) if kind != CONVOLUTION else layer
    elif kind == HALO:
        layer = halo(problem)
    elif case.part == "calls":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about eight heads of eight channels being narrow
            layer = sasa.RelativeSelfAttention(*channels, problem.kernel_size, int(peer.split()[1]))
    else:
        layer = UnfoldSelfAttention(*channels, problem.kernel_size, problem.num_heads)
        if kind != "unfold":
            layer = sasa.RelativeSelfAttention.from_notebook(layer.state_dict(), problem.num_heads)
            layer.recompute = True if kind == "sasa recompute" else layer.recompute
    if hasattr(layer, "implementation"):
        layer.implementation = device.implementation
    layer = layer.to(device.name, dtype_of(case, peer))
    return layer.to(memory_format=torch.channels_last) if wants_channels_last(case, peer) else layer


def halo(problem: LayerProblem) -> nn.Module:
    """Halo attention of timm with the same reach: blocks of 8x8 queries (7x7 if 8 doesn't divide the image), halo 3.

    A query sees its whole block and the halo around it, so its results can't be compared with ours.
    """
    from timm.layers.halo_attn import HaloAttn

    block = 8 if problem.size % 8 == 0 else 7
    options = {"num_heads": problem.num_heads, "block_size": block, "halo_size": problem.kernel_size // 2}
    return HaloAttn(problem.in_channels, problem.out_channels, **options)


def wants_channels_last(case: Case, peer: str) -> bool:
    """Whether a layer gets its input in this format; the others would copy it, and are faster without."""
    return case.part == "layer" and peer.startswith(("sasa", CONVOLUTION))


def inputs(case: Case, device: Device) -> tuple[Tensor, Tensor]:
    """An input, and a gradient of the output."""
    torch.manual_seed(1)
    problem = case.problem
    x, grad = (
        torch.randn(problem.batch, channels, problem.size, problem.size, device=device.name)
        for channels in (problem.in_channels, problem.out_channels)
    )
    return x, grad


def build(case: Case, peer: str, device: Device) -> Call:
    """Output, and in training the gradients of the input and of the parameters."""
    layer = layer_of(case, peer, device)
    x, grad = (tensor.to(dtype_of(case, peer)) for tensor in inputs(case, device))
    if wants_channels_last(case, peer):
        x, grad = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad))
    training = case.mode == "training"
    x.requires_grad_(training)
    return call_of(lambda: layer(x), case.mode, [x, *layer.parameters()], grad if training else None)


def check(case: Case, peer: str, call: Call, device: Device) -> float | None:
    """Output and input's gradient against float64: the convolution that was kept, else the layer in plain PyTorch."""
    if peer.startswith((CONVOLUTION, HALO)):
        return None
    dtype = dtype_of(case, peer)
    right: Any = layer_of(case, CONVOLUTION if case.part == "kept" else peer.replace("unfold", "sasa"), device)
    right = right.to(dtype).double()
    if case.part != "kept":
        right.implementation = "reference" if device.on_cpu else "eager"
    x, grad = (tensor.to(dtype).double() for tensor in inputs(case, device))
    x.requires_grad_(case.mode == "training")
    expected = call_of(lambda: right(x), case.mode, [x], grad)()
    tolerance = PRECISIONS["bfloat16" if dtype == torch.bfloat16 else case.precision].tolerance
    return largest_difference(call()[: len(expected)], expected, tolerance)


PART = Part(cases, build, check)
KEPT_PART = Part(kept_cases, build, check)
CALLS_PART = Part(call_cases, build, check, baseline=lambda peer: CONVOLUTION, cpu_pace=Pace(0.02, 15, 60))
