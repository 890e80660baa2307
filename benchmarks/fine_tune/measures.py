"""What a conversion changes, what its strength affects, and what it costs."""

from __future__ import annotations

import copy
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

import sasa

from ..results import Figures
from .resnet20 import converted
from .training import Labelled, logits, normalised

STRENGTHS = (1.0, 2.0, 3.0, 8.0)


def conversion(network: nn.Module, first_stage: int, val: Labelled) -> Figures:
    """What a conversion changes on the validation images: only rounding."""
    before, after = logits(network, val[0]), logits(converted(network, first_stage), val[0])
    return {
        "first_stage": first_stage,
        "images": len(before),
        "correct_before": (before.argmax(1) == val[1]).sum().item(),
        "correct_after": (after.argmax(1) == val[1]).sum().item(),
        "equal_predictions": (before.argmax(1) == after.argmax(1)).sum().item(),
        "largest_logit": before.abs().max().item(),
        "largest_difference": (after - before).abs().max().item(),
    }


def strengths(network: nn.Module, val: Labelled, train: Labelled) -> list[Figures]:
    """Errors of the logits relative to float64 convolutions, and gradients before the first step, by strength."""
    exact = logits(copy.deepcopy(network).double(), val[0])
    found = []
    for strength in (None, *STRENGTHS):
        own = copy.deepcopy(network) if strength is None else converted(network, strength=strength)
        error = (logits(own, val[0]) - exact).abs().max().item()
        F.cross_entropy(own.train()(normalised(train[0])), train[1]).backward()
        layers = [module for module in own.modules() if isinstance(module, sasa.AttentionConv2d)]
        norms = {"query": [one.query.weight.grad for one in layers], "weight": [one.weight.grad for one in layers]}
        sizes = {
            f"{name}_gradient": nn.utils.get_total_norm([grad for grad in grads if grad is not None]).item()
            for name, grads in norms.items()
            if layers
        }
        weight = [one.weight.detach() for one in layers]
        found.append({"strength": strength, "error": error, **sizes})
        if layers:
            found[-1]["weight_norm"] = nn.utils.get_total_norm(weight).item()
    return found


def cost(networks: dict[str, nn.Module], train: Labelled, batch: int, turns: int = 3) -> dict[str, Figures]:
    """Parameters, and CPU seconds of a training step and of a forward pass; the networks take turns.

    CPU seconds, summed over threads: other load on the machine hardly affects them.
    """
    images, labels = normalised(train[0][:batch]), train[1][:batch]
    times: dict[str, dict[str, list[float]]] = {name: {"step": [], "forward": []} for name in networks}
    for turn in range(turns + 1):  # the first one warms up
        for name, network in networks.items():
            own = copy.deepcopy(network).train()
            optimizer = torch.optim.SGD(own.parameters(), 1e-3, momentum=0.9)
            began = time.process_time()
            F.cross_entropy(own(images), labels).backward()
            optimizer.step()
            stepped = time.process_time()
            with torch.inference_mode():
                own.eval()(images)
            if turn:
                times[name]["step"].append(stepped - began)
                times[name]["forward"].append(time.process_time() - stepped)
    return {
        name: {
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            **{
                what: {"median": statistics.median(own), "lowest": min(own), "highest": max(own)}
                for what, own in times[name].items()
            },
        }
        for name, network in networks.items()
    }
