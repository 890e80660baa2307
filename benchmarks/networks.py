"""Whole networks: images a second, forward and training, and the memory of a training step.

    python -m benchmarks.one networks "batch 8 forward" sasa_resnet50_convstem      one of its measurements

Images are 224x224, channels_last, float32; HaloNet's are 256x256, since its blocks don't divide 224. A training step is
forward, cross-entropy, backward, and SGD with momentum. Each network is timed in turn with ours, call by call, in one
process. "Folded": batch norms behind a convolution are folded into it, in every network alike; those behind attention
stay.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import sasa.models  # noqa: F401  (registers its networks in timm)

from .machine import machine
from .measure import Call, enough, largest_difference, measure, seconds_of
from .processes import summarise, take_turns

OURS = "sasa_resnet50_convstem"
TORCHVISION = "torchvision resnet50"
HALONET = "timm halonet50ts"
OF_DEPTH_50 = (OURS, "sasa_resnet50", TORCHVISION, "timm resnet50", HALONET)
SMALLER = ("sasa_resnet26_convstem", "sasa_resnet26_conv", "sasa_resnet38_convstem", "sasa_resnet38_conv")


class Case(NamedTuple):
    """What is compared: networks, a batch, and what is done with it."""

    batch: int
    mode: str
    peers: tuple[str, ...]


CASES = {
    "batch 8 forward": Case(8, "forward", (*OF_DEPTH_50, *SMALLER, "sasa_resnet26", "sasa_resnet38")),
    "batch 8 forward, folded": Case(8, "folded", OF_DEPTH_50[:3]),
    "batch 1 forward": Case(1, "forward", OF_DEPTH_50),
    "batch 8 training step": Case(8, "training", OF_DEPTH_50),
}
QUICK = {"batch 1 forward": Case(1, "forward", (OURS, TORCHVISION))}


def build(name: str) -> nn.Module:
    """A network with fresh parameters, channels_last."""
    torch.manual_seed(0)
    if name == TORCHVISION:
        import torchvision

        network = torchvision.models.resnet50()
    else:
        network = timm.create_model(name.removeprefix("timm "))
    return network.to(memory_format=torch.channels_last)


def images(name: str, batch: int, size: int | None = None) -> Tensor:
    """Random images of the size that the network takes."""
    torch.manual_seed(1)
    size = size or (256 if name == HALONET else 224)
    return torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)


def folded(network: nn.Module) -> nn.Module:
    """The network in evaluation mode without the batch norms that come straight behind a convolution."""
    network.eval()
    for module in network.modules():
        children = dict(module.named_children())
        names = list(children)
        sequential = isinstance(module, nn.Sequential)
        for index, name in enumerate(names):
            norm = names[index + 1] if sequential and index + 1 < len(names) else name.replace("conv", "bn")
            pair = children[name], children.get(norm)
            if isinstance(pair[0], nn.Conv2d) and isinstance(pair[1], nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(*pair).to(memory_format=torch.channels_last))
                setattr(module, norm, nn.Identity())
    return network


def forward_call(network: nn.Module, x: Tensor) -> Call:
    """Logits, without gradients."""

    def call() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return (network(x),)

    return call


def training_call(network: nn.Module, x: Tensor) -> tuple[Call, torch.optim.Optimizer]:
    """One step of SGD on random labels, and its optimizer."""
    network.train()
    labels = torch.arange(len(x)) * 7 % 1000
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

    def call() -> tuple[Tensor, ...]:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), labels)
        loss.backward()
        optimizer.step()
        return (loss.detach(),)

    return call, optimizer


def call(name: str, mode: str, x: Tensor) -> Call:
    """What is measured; what it needs to load has been loaded, by small images."""
    network = build(name)
    small = images(name, 2, None if name == HALONET else 64)
    if mode == "training":
        warm, optimizer = training_call(network, small)
        warm()
        optimizer.zero_grad()
        optimizer.state.clear()
        return training_call(network, x)[0]
    network = folded(network) if mode == "folded" else network.eval()
    forward_call(network, small)()
    return forward_call(network, x)


def check(name: str, mode: str) -> float:
    """Largest difference of the logits from those of the reference in float64; raises unless it is rounding."""
    network = build(name)
    _ = folded(network) if mode == "folded" else network.eval()
    x = images(name, 2, 64)
    results = forward_call(network, x)()
    right = build(name).eval().double()
    for module in right.modules():
        if hasattr(module, "implementation"):
            module.implementation = "reference"
    return largest_difference(results, forward_call(right, x.double())(), torch.float32)


def measured(case: str, peer: str) -> dict[str, Any]:
    """The figures of one network in this process; those of ours are checked before."""
    batch, mode, _ = (CASES | QUICK)[case]
    result = {"largest_difference": check(peer, mode)} if peer.startswith("sasa") else {}
    own = call(peer, mode, images(peer, batch))
    result |= measure(own, least_calls=1, slow_seconds=10)
    if peer != OURS:
        ours = call(OURS, mode, images(OURS, batch))
        ours()
        seconds: tuple[list[float], list[float]] = ([], [])
        while not enough(seconds[0], 3 if mode == "training" else 5, slow_seconds=10):
            for timed, one in zip(seconds, (own, ours), strict=True):
                timed.append(seconds_of(one))
        result["seconds"], result["sasa_seconds"] = map(statistics.median, seconds)
        result["calls"] = len(seconds[0])
    return result


@functools.cache
def parameters(name: str) -> int:
    """Numbers to be trained."""
    return sum(p.numel() for p in build(name).parameters())


def run(quick: bool, say: Callable[[str], object]) -> dict[str, Any]:
    """All cases, one after the other; the networks of a case take turns."""
    found = []
    for name, case in (QUICK if quick else CASES).items():
        turns = take_turns("networks", [(name, peer) for peer in case.peers], say, quick)
        peers = {}
        for peer in case.peers:
            own = turns[name, peer]
            ours = [{"seconds": figures.get("sasa_seconds", figures["seconds"])} for figures in own]
            peers[peer] = summarise(own, ours)
            peers[peer] |= {
                "images_per_second": case.batch / peers[peer]["seconds"],
                "parameters": parameters(peer),
                "size": images(peer, 1).shape[-1],
            }
        found.append({"case": name, "batch": case.batch, "mode": case.mode, "peers": peers})
    return {"machine": machine(), "cases": found}
