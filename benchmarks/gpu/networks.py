"""Whole networks, timm's names: images a second and memory, as written (eager) and under torch.compile.

Images are 224x224, channels_last, HaloNet's 256x256, since its blocks don't divide 224. All networks compute under
autocast to bfloat16, forward without gradients as well, with parameters in float32. A training step is forward,
cross-entropy, backward, and SGD with momentum. Peak memory is above weights, momenta and the last step's gradients.
sasa computes with what it chooses itself, which the results name.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..measure import Call, largest_difference
from .attention import MODES
from .clock import Pace
from .plan import COMPILED, TARGET, Case, RefusedError, Setting
from .precision import PRECISIONS

PACE = Pace(200, 3, 6)
OURS = "sasa_resnet50_convstem"
RESNET, HALONET = "resnet50", "halonet50ts"
NETWORKS = (OURS, "sasa_resnet50", RESNET, HALONET)
HALONET_SIZE = 256
TOLERANCE = 1e-3  # of logits in float32, relative to the largest, after 50 layers


class NetworkProblem(NamedTuple):
    """Images for a network."""

    batch: int
    size: int


def cases(quick: bool) -> list[Case]:
    """Forward and training step, eager and compiled."""
    problem = NetworkProblem(2, 40) if quick else NetworkProblem(128, 224)
    words = {"forward": "forward", "training": "training step"}

    def each(peers: tuple[str, ...], compiled: bool, rank: int) -> list[Case]:
        end = ", compiled" if compiled else ""
        return [
            Case(
                "networks",
                f"batch {problem.batch} {words[mode]}{end}",
                mode,
                "bfloat16",
                problem,
                peers,
                rank,
                compiled,
            )
            for mode in MODES
        ]

    if quick:
        return each((OURS, RESNET, HALONET), False, TARGET) + each((OURS,), True, COMPILED)
    return (
        each(NETWORKS, False, TARGET)
        + each((OURS, RESNET), True, COMPILED)
        + each(("sasa_resnet50", HALONET), True, COMPILED + 1)
    )


def baseline(case: Case, peer: str) -> str:
    """Ours with the convolution stem."""
    return OURS


def compiles(case: Case, peer: str) -> bool:
    """Whether it runs under torch.compile."""
    return case.compiled


def network_of(name: str, device: str) -> nn.Module:
    """A network with fresh parameters, channels_last."""
    import timm

    import sasa.models  # noqa: F401  (registers its networks in timm)

    torch.manual_seed(0)
    return timm.create_model(name).to(device, memory_format=torch.channels_last)


@functools.cache
def parameters(name: str) -> int:
    """Numbers to be trained."""
    import timm

    import sasa.models  # noqa: F401

    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


def size_of(case: Case, name: str) -> int:
    """Pixels along a side of the images that a network gets."""
    return HALONET_SIZE if name == HALONET and case.problem.size == 224 else case.problem.size


def images(batch: int, size: int, device: str) -> Tensor:
    """Random images."""
    torch.manual_seed(1)
    return torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)


def build(case: Case, peer: str, setting: Setting) -> Call:
    """Logits, or one training step."""
    if case.compiled and setting.quick:
        raise RefusedError("nothing is compiled in --quick")
    network = network_of(peer, setting.device).train(case.mode == "training")
    x = images(case.problem.batch, size_of(case, peer), setting.device)
    function = torch.compile(network, dynamic=False) if case.compiled else network
    autocast = functools.partial(torch.autocast, setting.device, torch.bfloat16)

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad(), autocast():
            return (function(x),)

    if case.mode == "forward":
        return forward
    labels = torch.arange(len(x), device=setting.device) * 7 % 1000
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def step() -> tuple[Tensor, ...]:
        optimizer.zero_grad()
        with autocast():
            loss = F.cross_entropy(function(x), labels)
        loss.backward()
        optimizer.step()
        return (loss.detach(),)

    return step


def check(case: Case, peer: str, call: Call, setting: Setting) -> float | None:
    """Logits of our networks in float32 against plain PyTorch in float64, on small images, once for each network."""
    if not peer.startswith("sasa") or case.compiled or case.mode == "training":
        return None
    PRECISIONS["float32"].allow()
    try:
        x = images(2, 64, setting.device)
        right = network_of(peer, setting.device).eval().double()
        for module in right.modules():
            if hasattr(module, "implementation"):
                module.implementation = "eager"
        with torch.no_grad():
            results = network_of(peer, setting.device).eval()(x)
            return largest_difference([results], [right(x.double())], torch.float32, TOLERANCE)
    finally:
        PRECISIONS[case.precision].allow()


def figures(case: Case, peer: str, found: dict[str, Any], machine: dict[str, Any]) -> dict[str, float]:
    """Images a second, of the median, slowest and fastest turn."""
    batch = case.problem.batch
    return {
        "images_per_second": 1e3 * batch / found["milliseconds"],
        "images_per_second_lowest": 1e3 * batch / found["milliseconds_highest"],
        "images_per_second_highest": 1e3 * batch / found["milliseconds_lowest"],
        "parameters": parameters(peer),
        "size": size_of(case, peer),
    }
