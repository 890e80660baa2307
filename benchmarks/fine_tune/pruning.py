"""Heads of fine-tuned attention taken away, beside taps of the fine-tuned convolution; and both networks from scratch.

    python -m benchmarks.fine_tune.pruning --weights resnet20-cifar10.safetensors --images cifar10 --out runs/pruning

In each layer of the last stage the heads (taps) whose matrix has the least norm are set to zero and kept there: by
themselves, and with one more epoch of training. A finished run is stored in its own file in the folder and not
repeated; results.json is made from them. docs/fine-tuning.md shows the figures.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import sasa

from ..machine import machine
from ..results import Figures
from .__main__ import NETWORKS, FineTuningRuns
from .resnet20 import ResNet20, converted, trained
from .training import FineTuning, evaluate, fine_tune, read

HEADS = 9
PRUNED = (0, 1, 2, 3, 4, 6)  # of nine
RATE = 0.003  # the best of both in the study of fine-tuning
SCRATCH_EPOCHS, SCRATCH_RATES = 20, (0.03, 0.1)


def layers(network: nn.Module) -> list[Any]:
    """What is pruned: the last stage's attention, or its convolutions."""
    every = [module for name, module in network.named_modules() if name.startswith("layer3.")]
    kinds = [[module for module in every if isinstance(module, kind)] for kind in (sasa.AttentionConv2d, nn.Conv2d)]
    return kinds[0] or kinds[1]


def by_head(weight: Tensor) -> Tensor:
    """A weight as one matrix for each head (heads, out, in, 1, 1), or for each tap (out, in, kh, kw)."""
    return weight.flatten(1) if weight.dim() == 5 else weight.permute(2, 3, 0, 1).flatten(0, 1).flatten(1)


def mask(weight: Tensor, count: int) -> Tensor:
    """Zeros for the ``count`` heads (taps) of least norm, and ones."""
    kept = torch.ones(HEADS, dtype=weight.dtype)
    kept[by_head(weight).norm(dim=1).argsort()[:count]] = 0
    shaped = kept.view(-1, 1, 1, 1, 1) if weight.dim() == 5 else kept.view(1, 1, *weight.shape[2:])
    return shaped.expand_as(weight).contiguous()


def pruned(network: nn.Module, count: int) -> nn.Module:
    """A copy without so many of each layer's heads (taps), which stay zero in training."""
    network = copy.deepcopy(network)
    for layer in layers(network):
        prune.custom_from_mask(layer, "weight", mask(layer.weight.detach(), count))
    return network


class PruningRuns(FineTuningRuns):
    """All runs of a folder."""

    def say(self, text: str) -> None:
        """Progress."""
        print(f"\r{text.rstrip():<70}", end="\n" if text.endswith("\n") else "", flush=True)

    def prune(self, name: str, strength: float | None, seed: int) -> Figures:
        """One fine-tuned network, pruned more and more."""

        def measure() -> Figures:
            started = copy.deepcopy(self.network) if strength is None else converted(self.network, 3, strength)
            epochs = fine_tune(started, self.train, self.val, self.recipe, RATE, seed, self.say)
            found: Figures = {"network": name, "seed": seed, "epochs": epochs, "pruned": []}
            again = replace(self.recipe, epochs=1)
            for count in PRUNED:
                own = pruned(started, count)
                before = evaluate(own, self.val)
                after = fine_tune(own, self.train, self.val, again, RATE, seed + 1000, self.say)[-1]
                found["pruned"].append({"count": count, **before, "trained": after["top1"]})
            return found

        return self.kept(f"pruned-{name}-seed-{seed}", measure)

    def scratch(self, name: str, strength: float | None, rate: float, seed: int, held_out: bool = False) -> Figures:
        """One training from random weights, the same for both networks."""

        def measure() -> Figures:
            torch.manual_seed(seed)
            fresh: nn.Module = ResNet20().to(memory_format=torch.channels_last)
            own = fresh if strength is None else converted(fresh, 3, strength)
            longer, few = replace(self.recipe, epochs=SCRATCH_EPOCHS), (self.held_out[0][:64], self.held_out[1][:64])
            fine_tune(own, self.train, few, longer, rate, seed, self.say)
            return {
                "network": name,
                "seed": seed,
                "rate": rate,
                **evaluate(own, self.held_out if held_out else self.val),
            }

        return self.kept(f"scratch-{name}-rate-{rate:g}-seed-{seed}", measure)

    def results(self) -> Figures:
        """Everything measured."""
        tuning = [
            self.scratch(name, strength, rate, self.recipe.tuning_seed, held_out=True)
            for rate in SCRATCH_RATES
            for name, strength in NETWORKS.items()
        ]
        best: dict[str, Any] = {
            name: max((one for one in tuning if one["network"] == name), key=lambda one: one["top1"])
            for name in NETWORKS
        }
        return {
            "machine": machine(),
            "pruned": [self.prune(n, s, seed) for seed in self.recipe.seeds for n, s in NETWORKS.items()],
            "tuning": tuning,
            "scratch": [
                self.scratch(name, strength, best[name]["rate"], seed)
                for seed in self.recipe.seeds
                for name, strength in NETWORKS.items()
            ],
        }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of a ResNet-20 for CIFAR-10")
    parser.add_argument("--images", type=Path, required=True, help="folder with train/CLASS/ and val/CLASS/, 32x32")
    parser.add_argument("--out", type=Path, required=True, help="folder for results; runs finished there are kept")
    parser.add_argument("--train-images", type=int, default=FineTuning.train_images)
    options = parser.parse_args()
    train, val = (read(options.images / part) for part in ("train", "val"))
    options.out.mkdir(parents=True, exist_ok=True)
    recipe = FineTuning(train_images=options.train_images)
    found = PruningRuns(trained(options.weights), train, val, recipe, options.out).results()
    (options.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {options.out / 'results.json'}")


if __name__ == "__main__":
    main()
