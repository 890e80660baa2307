"""Whole networks: images per second, forward and training, and the memory of a training step.

Images are 224x224, channels_last; HaloNet's are 256x256, since its blocks don't divide 224. A training step is forward,
cross-entropy, backward, and SGD with momentum. On a CPU in float32; "folded": batch norms after a convolution are
folded into it in every network; those after attention are kept. On a GPU under autocast to bfloat16 with parameters in
float32, as written and compiled; sasa uses its default implementation.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sasa.export import fold_batch_norms

from .cases import COMPILED, PRECISIONS, TARGET, Case, Device, Pace, Part, RefusedError
from .clock import with_rate
from .verify import Call, largest_difference

OURS, FULL = "sasa_resnet50_convstem", "sasa_resnet50"
RESNET, HALONET = "torchvision resnet50", "timm halonet50ts"
OF_DEPTH_50 = (OURS, FULL, RESNET, "timm resnet50", HALONET)
SMALLER = ("sasa_resnet26_convstem", "sasa_resnet26_conv", "sasa_resnet38_convstem", "sasa_resnet38_conv")
HALONET_SIZE = 256
TOLERANCE = 1e-3  # of logits in float32, relative to the largest, after 50 layers


class NetworkProblem(NamedTuple):
    """Images for a network."""

    batch: int
    size: int = 224

    def tiny(self) -> NetworkProblem:
        """A small input that loads all code."""
        return NetworkProblem(2, 64)


def cases(device: Device) -> list[Case]:
    """Forward and training step."""
    words = {"forward": "forward", "training": "training step", "folded": "forward, folded"}

    def each(batch: int, mode: str, peers: tuple[str, ...], rank: int = TARGET, compiled: bool = False) -> Case:
        problem = NetworkProblem(batch, 64) if device.quick else NetworkProblem(batch)
        name = f"batch {batch} {words[mode]}{', compiled' if compiled else ''}"
        precision = "float32" if device.on_cpu else "bfloat16"
        return Case("networks", name, mode, problem, peers, precision, rank, compiled)

    if device.quick:
        return [each(2, "forward", (OURS, RESNET)), each(2, "training", (OURS,)), each(2, "forward", (OURS,), 2, True)]
    if device.on_cpu:
        return [
            each(8, "forward", (*OF_DEPTH_50, *SMALLER, "sasa_resnet26", "sasa_resnet38")),
            each(8, "folded", OF_DEPTH_50[:3]),
            each(1, "forward", OF_DEPTH_50),
            each(8, "training", OF_DEPTH_50),
        ]
    chosen = ((OF_DEPTH_50, TARGET, False), ((OURS, RESNET), COMPILED, True), ((FULL, HALONET), COMPILED + 1, True))
    return [each(128, mode, *rest) for rest in chosen for mode in ("forward", "training")]


def network_of(name: str) -> nn.Module:
    """A network with fresh parameters."""
    import timm

    import sasa.models  # noqa: F401  (registers its networks in timm)

    torch.manual_seed(0)
    if name == RESNET:
        import torchvision

        return torchvision.models.resnet50()
    return timm.create_model(name.removeprefix("timm "))


@functools.cache
def parameters(name: str) -> int:
    """Number of trainable parameters."""
    with torch.device("meta"):
        return sum(p.numel() for p in network_of(name).parameters())


def images(name: str, problem: NetworkProblem, device: str) -> Tensor:
    """Random images of the size that the network expects."""
    torch.manual_seed(1)
    size = HALONET_SIZE if name == HALONET else problem.size
    return torch.randn(problem.batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)


def build(case: Case, peer: str, device: Device) -> Call:
    """Logits, or the loss of one training step."""
    if case.compiled and device.quick:
        raise RefusedError("nothing is compiled in --quick")
    network = network_of(peer)
    network = fold_batch_norms(network.eval()) if case.mode == "folded" else network.train(case.mode == "training")
    network = network.to(device.name, memory_format=torch.channels_last)
    x = images(peer, case.problem, device.name)
    function = torch.compile(network, dynamic=False) if case.compiled else network

    def precision() -> contextlib.AbstractContextManager[Any]:
        if case.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(device.name, PRECISIONS[case.precision].dtype)

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad(), precision():
            return (function(x),)

    if case.mode != "training":
        return forward
    labels = torch.arange(len(x), device=device.name) * 7 % 1000
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

    def step() -> tuple[Tensor, ...]:
        optimizer.zero_grad()
        with precision():
            loss = F.cross_entropy(function(x), labels)
        loss.backward()
        optimizer.step()
        return (loss.detach(),)

    return step


def check(case: Case, peer: str, call: Call, device: Device) -> float | None:
    """Logits of our networks in float32 against plain PyTorch in float64, on small images, once for each network."""
    if not peer.startswith("sasa") or case.compiled or case.mode == "training":
        return None
    PRECISIONS["float32"].allow()
    own, right = (network_of(peer).to(device.name) for _ in range(2))
    own = fold_batch_norms(own.eval()) if case.mode == "folded" else own.eval()
    right = right.eval().double()
    for module in right.modules():
        if hasattr(module, "implementation"):
            module.implementation = "reference" if device.on_cpu else "eager"
    x = images(peer, case.problem.tiny(), device.name)
    with torch.no_grad():
        results = own.to(memory_format=torch.channels_last)(x)
        difference = largest_difference([results], [right(x.double())], TOLERANCE)
    PRECISIONS[case.precision].allow()
    return difference


def figures(case: Case, peer: str, found: dict[str, Any]) -> dict[str, Any]:
    """Images a second."""
    size = HALONET_SIZE if peer == HALONET else case.problem.size
    return {
        **with_rate("images_per_second", case.problem.batch, found),
        "parameters": parameters(peer),
        "size": size,
    }


# Interruptions by other processes affect single steps that take seconds: many short turns on a CPU.
PART = Part(cases, build, check, figures, lambda peer: OURS, cpu_pace=Pace(0.001, 15, 10), gpu_pace=Pace(0.2, 3, 6))
