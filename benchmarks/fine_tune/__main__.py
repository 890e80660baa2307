"""A trained ResNet-20 fine-tuned unchanged, and with attention in it: which is better, and what it costs.

    python -m benchmarks.fine_tune --weights resnet20-cifar10.safetensors --images cifar10 --out runs/fine-tune

First shows that the conversion keeps every prediction. Both networks are then trained in the same way, each at the best
of three learning rates, chosen on held-out training images. A finished run is stored in its own file in the folder and
not repeated; results.json and curve.png are made from these files. docs/fine-tuning.md shows and discusses the figures.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..machine import machine
from ..results import Figures
from .measures import conversion, cost, strengths
from .report import draw
from .resnet20 import STRENGTH, converted, trained
from .training import EVALUATED, FineTuning, Labelled, fine_tune, read

NETWORKS = {"convolution": None, "attention": STRENGTH}
OTHER_STRENGTHS = (1.0, 3.0)  # trained with one seed


class FineTuningRuns:
    """All runs of a folder; each is trained once, even if the command is interrupted in between."""

    def __init__(self, network: nn.Module, train: Labelled, val: Labelled, recipe: FineTuning, folder: Path) -> None:
        self.network, self.val, self.recipe, self.folder = network, val, recipe, folder
        order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0))
        chosen, held_out = order[: recipe.train_images], order[len(order) - recipe.held_out :]
        self.train, self.held_out = ((train[0][some], train[1][some]) for some in (chosen, held_out))

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """The contents of a file in the folder, which is created first if it doesn't exist."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            text = json.dumps(make(), indent=1) + "\n"
            partial = path.with_suffix(".partial")  # never a partial file under the final name
            partial.write_text(text)
            partial.replace(path)
        return json.loads(path.read_text())

    def run(
        self, name: str, strength: float | None, rate: float, seed: int, val: Labelled, stage: int | None = None
    ) -> Figures:
        """One training."""
        first_stage = self.recipe.first_stage if stage is None else stage
        words = name if strength is None else f"{name}-{strength:g}"
        words += f"-stage-{first_stage}" if first_stage != self.recipe.first_stage else ""
        words += f"-rate-{rate:g}-seed-{seed}"

        def say(text: str) -> None:
            print(f"\r{words}: {text.rstrip():<50}", end="\n" if text.endswith("\n") else "", flush=True)

        def train() -> Figures:
            own = self.network
            started = copy.deepcopy(own) if strength is None else converted(own, first_stage, strength)
            epochs = fine_tune(started, self.train, val, self.recipe, rate, seed, say)
            return {"network": name, "strength": strength, "rate": rate, "seed": seed, "epochs": epochs}

        return self.kept(words, train)

    def results(self) -> Figures:
        """Everything measured."""
        recipe, network = self.recipe, self.network
        train, val = ((images[:EVALUATED], labels[:EVALUATED]) for images, labels in (self.train, self.held_out))
        convolved_and_converted = {"convolution": network} | {str(s): converted(network, s) for s in (3, 2, 1)}
        found = {
            "machine": machine(),
            "recipe": asdict(recipe),
            "conversion": [
                self.kept(f"conversion-{stage}", lambda stage=stage: conversion(network, stage, self.val))
                for stage in sorted({1, recipe.first_stage})
            ],
            "strengths": self.kept("strengths", lambda: strengths(network, val, train)),
            "tuning": [
                self.run(name, strength, rate, recipe.tuning_seed, self.held_out)
                for rate in recipe.rates
                for name, strength in NETWORKS.items()
            ],
        }
        best = {name: best_rate(found["tuning"], name) for name in NETWORKS}
        found["runs"] = [
            self.run(name, strength, best[name], seed, self.val)
            for seed in recipe.seeds
            for name, strength in NETWORKS.items()
        ]
        found["runs"] += [
            self.run("attention", strength, best["attention"], recipe.seeds[0], self.val)
            for strength in OTHER_STRENGTHS
        ]
        found["cost"] = self.kept("cost", lambda: cost(convolved_and_converted, self.train, recipe.batch))
        found["all_stages"] = [
            self.run("attention", STRENGTH, best["attention"], seed, self.val, stage=1) for seed in recipe.seeds[:1]
        ]
        return found


def best_rate(tuning: list[Figures], network: str) -> float:
    """The learning rate of the run with the highest final accuracy."""
    return max((one for one in tuning if one["network"] == network), key=lambda one: one["epochs"][-1]["top1"])["rate"]


def main() -> None:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of a ResNet-20 for CIFAR-10")
    parser.add_argument("--images", type=Path, required=True, help="folder with train/CLASS/ and val/CLASS/, 32x32")
    parser.add_argument("--out", type=Path, required=True, help="folder for results; runs finished there are kept")
    parser.add_argument(
        "--first-stage", type=int, choices=(1, 2, 3), default=FineTuning.first_stage, help="that attends"
    )
    parser.add_argument("--train-images", type=int, default=FineTuning.train_images)
    parser.add_argument(
        "--held-out", type=int, default=FineTuning.held_out, help="images that choose the learning rate"
    )
    parser.add_argument("--epochs", type=int, default=FineTuning.epochs)
    options = parser.parse_args()
    needed = {options.weights: "--weights", options.images / "train": "--images", options.images / "val": "--images"}
    for path, argument in needed.items():
        if not path.exists():
            parser.error(f"{argument}: expected {path} to exist")
    recipe = FineTuning(options.first_stage, options.train_images, options.held_out, options.epochs)
    options.out.mkdir(parents=True, exist_ok=True)
    train, val = (read(options.images / part) for part in ("train", "val"))
    if recipe.train_images + recipe.held_out > len(train[0]):
        got = f"{recipe.train_images} and {recipe.held_out}"
        parser.error(f"--train-images and --held-out: expected at most {len(train[0])} together, got {got}")
    try:
        network = trained(options.weights)
    except ValueError as error:
        parser.error(f"--weights: {error}")
    study = FineTuningRuns(network, train, val, recipe, options.out)
    settings = {"machine": machine(), "recipe": asdict(recipe)}
    if study.kept("settings", lambda: settings) != json.loads(json.dumps(settings)):
        parser.error(f"--out: expected a folder of runs with these options on this machine, got {options.out}")
    results = study.results()
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, options.out / "curve.png")
    print(f"wrote {options.out / 'results.json'} and curve.png")


if __name__ == "__main__":
    main()
