"""How attention networks start compared with the convolutional ones they were converted from: spread, gradients, steps.

    python -m benchmarks.start                    everything, about ten minutes; writes benchmarks/results/start.json
    python -m benchmarks.start --only chain       one part: chain, gradients or overfitting

Peers: the convolution (He et al. 2015), attention as ``sasa.convert`` builds it, and "no taps", the same without the
queries' bias, without which heads can't start on their own taps.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
from torch import Tensor, nn

import sasa

from .machine import described, machine
from .results import RESULTS

FILE = RESULTS / "start.json"
DEPTH = 16
SEEDS = (0, 1)
PEERS = ("convolution", "attention", "no taps")

# name -> images of the chain, of 64 channels: independent pixels, or smooth ones.
CHAINS: dict[str, Callable[[], Tensor]] = {
    "independent pixels, 32x32": lambda: torch.randn(4, 64, 32, 32),
    "independent pixels, 8x8": lambda: torch.randn(4, 64, 8, 8),
    "independent pixels, 16x16": lambda: torch.randn(4, 64, 16, 16),
    "smooth, 32x32": lambda: smooth(torch.randn(4, 64, 8, 8), 32),
}

# A last batch norm that starts at 0 would hide the gradients of a residual branch, so it starts at 1 here.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision vgg11": lambda: torchvision.models.vgg11(num_classes=10),
    "timm vgg11": lambda: timm.create_model("vgg11", num_classes=10),
    "hrnet_w18": lambda: timm.create_model("hrnet_w18", num_classes=10),
    "res2net50_26w_4s": lambda: timm.create_model("res2net50_26w_4s", num_classes=10, zero_init_last=False),
    "densenet121": lambda: timm.create_model("densenet121", num_classes=10),
    "ese_vovnet39b": lambda: timm.create_model("ese_vovnet39b", num_classes=10),
    "resnet18": lambda: timm.create_model("resnet18", num_classes=10, zero_init_last=False),
}


def smooth(coarse: Tensor, size: int) -> Tensor:
    """Images of variance 1 whose neighbouring pixels correlate."""
    x = F.interpolate(coarse, size=size, mode="bilinear")
    return x / x.std()


def chain(in_channels: int, width: int, depth: int = DEPTH) -> nn.Sequential:
    """Only convolutions and ReLUs, initialised as in He et al. 2015."""
    layers: list[nn.Module] = []
    for index in range(depth):
        conv = nn.Conv2d(width if index else in_channels, width, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  (it has one)
        layers += [conv, nn.ReLU()]
    return nn.Sequential(*layers)


def peers_of(network: nn.Module, everywhere: bool = False) -> dict[str, nn.Module]:
    """The network, and what it becomes."""
    where = (lambda _name, _module: True) if everywhere else None
    attention, flat = sasa.convert(network, where=where), sasa.convert(network, where=where, bias=False)
    return dict(zip(PEERS, (network, attention, flat), strict=True))


def spreads(seed: int, images: Callable[[], Tensor]) -> dict[str, float]:
    """Standard deviation of the chain's outputs."""
    torch.manual_seed(seed)
    x = images()
    with torch.no_grad():
        return {name: net(x).std().item() for name, net in peers_of(chain(x.shape[1], 64), everywhere=True).items()}


def gradient_norms(seed: int, build: Callable[[], nn.Module], size: int = 128) -> dict[str, float]:
    """Norm of the gradient over all parameters, in training mode, for four images of noise."""
    torch.manual_seed(seed)
    network = build().train()
    x, labels = torch.randn(4, 3, size, size), torch.randint(10, (4,))
    norms = {}
    for name, net in peers_of(network).items():
        torch.manual_seed(seed)  # the same dropout
        F.cross_entropy(net(x), labels).backward()
        norms[name] = math.sqrt(sum(p.grad.square().sum().item() for p in net.parameters() if p.grad is not None))
    return norms


def steps_to_overfit(seed: int, most: int = 300, size: int = 8) -> dict[str, int]:
    """Steps of Adam until the chain has learned 16 images of noise: their loss below 0.1; ``most`` if it hasn't."""
    torch.manual_seed(seed)
    x, labels = torch.randn(16, 3, size, size), torch.arange(16) % 10
    body = chain(3, 32)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    steps = {}
    for name, net in peers_of(nn.Sequential(body, *head), everywhere=True).items():
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for steps[name] in range(most + 1):
            loss = F.cross_entropy(net(x), labels)
            if loss.item() < 0.1:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return steps


PARTS: dict[str, dict[str, Callable[[int], dict[str, Any]]]] = {
    "chain": {name: lambda seed, images=images: spreads(seed, images) for name, images in CHAINS.items()},
    "gradients": {name: lambda seed, build=build: gradient_norms(seed, build) for name, build in NETWORKS.items()},
    "overfitting": {f"16 images, depth {DEPTH}": steps_to_overfit},
}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be repeated")
    options = parser.parse_args()
    here = machine()
    console = Console(highlight=False, soft_wrap=True)
    console.print(described(here))
    result = json.loads(FILE.read_text()) if FILE.exists() and options.only else {}
    result["machine"] = here
    for part in options.only or PARTS:
        result[part] = {}
        for name, measured in PARTS[part].items():
            seeds = [measured(seed) for seed in SEEDS]
            result[part][name] = {peer: [seed[peer] for seed in seeds] for peer in PEERS}
            for peer, figures in result[part][name].items():
                console.print(f"{part:12}{name:28}{peer:14}", *(f"{figure:10.3g}" for figure in figures))
    FILE.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
