"""The whole layer, projections included, beside other ways to have such a layer and beside a 3x3 convolution.

    python -m benchmarks.one layer "notebook forward" unfold      one of its measurements

Training is forward and backward with gradients of the input and of all parameters, as inside a network.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sasa

from .machine import import_seconds, machine
from .measure import Call, call_of, largest_difference, measure
from .peers import UnfoldSelfAttention
from .problems import LAYERS, LayerProblem
from .processes import summarise, take_turns

BFLOAT16 = " bfloat16"  # ends the names of what runs in it; the others run in float32
CONVOLUTION = "convolution 3x3"
HALO = "timm HaloAttn"
# Whether the layer can project again in the backward pass instead of keeping queries, keys and values.
CAN_RECOMPUTE = "recompute" in inspect.signature(sasa.RelativeSelfAttention).parameters
OURS = ("sasa", "sasa recompute") if CAN_RECOMPUTE else ("sasa",)
IN_BFLOAT16 = ("sasa" + BFLOAT16, CONVOLUTION + BFLOAT16)


class Case(NamedTuple):
    """What is compared: layers on a problem, ``"forward"`` or ``"training"`` (forward and backward)."""

    problem: str
    mode: str
    peers: tuple[str, ...]


# unfold's backward does not fit into memory for the notebook's batch.
CASES = {
    "notebook forward": Case("notebook", "forward", (*OURS, CONVOLUTION, *IN_BFLOAT16, HALO, "unfold")),
    "notebook training": Case("notebook", "training", (*OURS, CONVOLUTION, HALO)),
    "notebook-batch8 training": Case("notebook-batch8", "training", (*OURS, CONVOLUTION, HALO, "unfold")),
    "stage4 forward": Case("stage4", "forward", (*OURS, CONVOLUTION, HALO, "unfold")),
    "stage4 training": Case("stage4", "training", (*OURS, CONVOLUTION, HALO, "unfold")),
}
QUICK = {
    "small forward": Case("small", "forward", (*OURS, CONVOLUTION, *IN_BFLOAT16, HALO, "unfold")),
    "small training": Case("small", "training", (*OURS, CONVOLUTION, HALO, "unfold")),
}


def dtype_of(name: str) -> torch.dtype:
    """What a layer of this name computes in."""
    return torch.bfloat16 if name.endswith(BFLOAT16) else torch.float32


def build(name: str, problem: LayerProblem) -> nn.Module:
    """A layer for the problem; sasa and unfold have the same weights, HaloAttn and the convolution their own."""
    torch.manual_seed(0)
    kind, channels = name.removesuffix(BFLOAT16), (problem.in_channels, problem.out_channels)
    layer: nn.Module
    if kind == CONVOLUTION:
        layer = nn.Conv2d(*channels, 3, padding=1)
    elif kind == HALO:
        layer = halo(problem)
    else:
        layer = UnfoldSelfAttention(*channels, problem.kernel_size, problem.num_heads)
        if kind != "unfold":
            layer = sasa.RelativeSelfAttention.from_notebook(layer.state_dict(), problem.num_heads)
        if kind == "sasa recompute":
            weights = layer.state_dict()
            options = {"position_split": "across_heads", "recompute": True}
            layer = sasa.RelativeSelfAttention(*channels, problem.kernel_size, problem.num_heads, **options)
            layer.load_state_dict(weights)
    layer = layer.to(dtype_of(name))
    return layer.to(memory_format=torch.channels_last) if wants_channels_last(name) else layer


def halo(problem: LayerProblem) -> nn.Module:
    """Halo attention of timm with the same reach: blocks of 8x8 queries (7x7 if 8 doesn't divide the image), halo 3.

    A query sees its whole block and the halo around it, so its results can't be compared with ours.
    """
    from timm.layers.halo_attn import HaloAttn

    block = 8 if problem.size % 8 == 0 else 7
    options = {"num_heads": problem.num_heads, "block_size": block, "halo_size": problem.kernel_size // 2}
    return HaloAttn(problem.in_channels, problem.out_channels, **options)


def wants_channels_last(name: str) -> bool:
    """Whether a layer gets its input so; the others copy it if given, and are faster without."""
    return name.startswith(("sasa", CONVOLUTION))


def inputs(problem: LayerProblem) -> tuple[Tensor, Tensor]:
    """An input, and a gradient of the output."""
    torch.manual_seed(1)
    shape = problem.size, problem.size
    return (
        torch.randn(problem.batch, problem.in_channels, *shape),
        torch.randn(problem.batch, problem.out_channels, *shape),
    )


def call(name: str, problem: LayerProblem, mode: str) -> Call:
    """The call to measure; training gives the gradient of the input, then those of the parameters."""
    layer = build(name, problem)
    x, grad = (tensor.to(dtype_of(name)) for tensor in inputs(problem))
    if wants_channels_last(name):
        x, grad = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad))
    x.requires_grad_(mode == "training")
    return call_of(lambda: layer(x), mode, [x, *layer.parameters()], grad if mode == "training" else None)


def check(name: str, problem: LayerProblem, mode: str) -> float:
    """Largest difference of output and input gradient from the reference in float64; raises unless it is rounding."""
    results = call(name, problem, mode)()
    layer = build("sasa", problem).to(dtype_of(name)).double()
    layer.implementation = "reference"
    x, grad = (tensor.to(dtype_of(name)).double() for tensor in inputs(problem))
    x.requires_grad_(mode == "training")
    expected = call_of(lambda: layer(x), mode, [x], grad)()
    return largest_difference(results[: len(expected)], expected, dtype_of(name))


def measured(case: str, peer: str) -> dict[str, Any]:
    """The figures of one layer, in this process, once its results are checked on a small image where they can be."""
    name, mode, _ = (CASES | QUICK)[case]
    problem, result = LAYERS[name], {}
    if peer.startswith((CONVOLUTION, HALO)):
        call(peer, problem.tiny(), mode)()
    else:
        result["largest_difference"] = check(peer, problem.tiny(), mode)
    return result | measure(call(peer, problem, mode))


def run(quick: bool, say: Callable[[str], object]) -> dict[str, Any]:
    """All cases, one after the other; the peers of a case take turns."""
    found = []
    for name, case in (QUICK if quick else CASES).items():
        turns = take_turns("layer", [(name, peer) for peer in case.peers], say, quick)
        shape = LAYERS[case.problem]._asdict() | {"qkv_out_gigabytes": LAYERS[case.problem].qkv_out_bytes / 1e9}
        peers = {peer: summarise(turns[name, peer], turns[name, "sasa"]) for peer in case.peers}
        found.append({"case": name, "mode": case.mode, **shape, "peers": peers})
    return {"machine": machine(), "import_seconds_after_torch": import_seconds(), "cases": found}
