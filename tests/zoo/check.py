"""What is done with each network of the zoo. An assertion that fails, or any other error, is a fault."""

from __future__ import annotations

import copy
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import sasa

from .networks import Network, Size

Result = dict[str, Any]
Convert = Callable[[nn.Module], nn.Module]


class RefusedError(Exception):
    """There is nothing that could be converted."""


WINDOW, HEADS = 3, 4
BOUND = 1e-4  # of a difference, relative to the largest output
# What is tried in turn, until there is something to convert.
WIDER: tuple[dict[str, bool], ...] = ({}, {"grouped": True}, {"grouped": True, "stem": True})
WIDER_KEPT: tuple[dict[str, bool], ...] = ({}, {"stem": True})


def converted(network: Network) -> Result:
    """Attention of fresh parameters: its plan, then :func:`runs`."""
    original, _ = fitted(network)
    options = _first_possible(original, WIDER, kernel_size=WINDOW, num_heads=HEADS)
    report = sasa.conversion_report(original, WINDOW, HEADS, **options)
    return {
        "options": sorted(options),
        "parameters": _count(original),
        "converted": len(report.converted),
        "left_alone": _brief(entry.why for entry in report.left_alone),
    } | runs(network, lambda model: sasa.convert(model, WINDOW, HEADS, **options))


def runs(network: Network, convert: Convert = copy.deepcopy) -> Result:
    """The sizes of all outputs, a training step, evaluation, and a state dict that a second conversion takes."""
    original, sizes = fitted(network)
    model = convert(original)
    for size in sizes:
        x = network.images(size)
        shapes = [[y.shape for y in _evaluated(network, m, x)] for m in (model, original)]
        assert shapes[0] == shapes[1], f"{size}: sizes {shapes[0]} instead of {shapes[1]}"
    x = network.images(sizes[0])
    _train(network, model, x)
    outputs = _evaluated(network, model, x)
    assert all(y.isfinite().all() for y in outputs), "evaluation is not finite"
    second = convert(original)
    second.load_state_dict(model.state_dict())
    for y, expected in zip(_evaluated(network, second, x), outputs, strict=True):
        assert torch.equal(y, expected), "a second conversion with the same state dict computes something else"
    return {"parameters_after": _count(model), "sizes": [list(size) for size in sizes]}


def kept(network: Network) -> Result:
    """The function kept: the outputs' largest difference, in float64 where float32 is too little for the network."""
    original, sizes = fitted(network)
    options = _first_possible(original, WIDER_KEPT, keep_function=True)
    report = sasa.conversion_report(original, keep_function=True, **options)
    model = sasa.convert(original, keep_function=True, **options)
    original = copy.deepcopy(original)
    x = network.images(sizes[0])
    differences = {}
    for dtype in (torch.float32, torch.float64):
        pairs = zip(*(_evaluated(network, m.to(dtype), x.to(dtype)) for m in (model, original)), strict=True)
        differences[str(dtype).removeprefix("torch.")] = difference = max(_difference(*pair) for pair in pairs)
        if difference <= BOUND:
            break
    assert difference <= BOUND, f"differences {differences}"
    not_kept = _brief(entry.why for entry in report.left_alone)
    return {"kept": len(report.converted), "not_kept": not_kept, "difference": differences}


@functools.lru_cache(maxsize=1)
def fitted(network: Network) -> tuple[nn.Module, tuple[Size, ...]]:
    """The network as it was, and the first sizes that it takes in training and evaluation."""
    original = network.build()
    *first, last = network.sizes(original)
    for sizes in first:
        try:
            for size in sizes:
                network.loss(original.train(), network.images(size))
                _evaluated(network, original, network.images(size))
        except Exception:  # any: they are other people's
            continue
        return original, sizes
    return original, last


def _first_possible(model: nn.Module, every: tuple[dict[str, bool], ...], **arguments: Any) -> dict[str, bool]:
    why = ""
    for options in every:
        try:
            sasa.conversion_report(model, **arguments, **options)
            return options
        except ValueError as error:
            why = str(error)
    first, *table = why.split("\n")
    reasons = [re.search(r"left alone \((.*)\)$", line) for line in table]
    raise RefusedError(first + f" {_brief(reason[1] for reason in reasons if reason)}")


@torch.no_grad()
def _evaluated(network: Network, model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    return network.outputs(model.eval(), x)


def _train(network: Network, model: nn.Module, x: Tensor) -> None:
    """One step, whose gradients are finite."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3)
    torch.manual_seed(0)
    loss = network.loss(model, x)
    assert loss.isfinite(), "the loss is not finite"
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
    layers = [layer for layer in model.modules() if isinstance(layer, sasa.RelativeSelfAttention)]
    asked = any(p.grad is not None for layer in layers for p in layer.parameters())
    assert asked or not layers, "no layer of attention has a gradient"
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # fresh networks may have gradients of any size
    optimizer.step()


def _difference(y: Tensor, expected: Tensor) -> float:
    if not expected.numel() or not expected.is_floating_point():
        return 0.0
    difference = float((y - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return difference if difference == difference else float("inf")


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _brief(reasons: Iterable[str]) -> dict[str, int]:
    """How many have a reason, in brief."""
    briefly = (re.sub(r"=\(.*?\)", "", why) for why in reasons)
    return dict(Counter(re.split(r"[,(:]", why)[0].strip() for why in briefly))
