"""Trained networks on altered images: noise, blur, contrast, shifts, rotations; and how stable they are.

    python -m benchmarks.evidence.robustness --work runs/evidence

Takes the networks of the studies ``fashion`` and ``cifar``; the changes are torchvision's, the same for all networks.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from sasa.study.plan import StudyPlan
from sasa.study.read import read_plan
from sasa.train import load_model
from sasa.train.sources import open_source
from sasa.train.transforms import fit_transform, normalise

from .networks import NETWORKS, name_of

IMAGES = 2_000
STUDIES = ("fashion", "cifar")


def _noise(x: Tensor, amount: float) -> Tensor:
    return (x + amount * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def _shift(x: Tensor, pixels: float) -> Tensor:
    return torch.roll(x, (int(pixels), int(pixels)), (2, 3))


CHANGES: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, float]]] = {
    "noise, deviation": (_noise, (0.1, 0.2)),
    "blur, pixels": (lambda x, sigma: F.gaussian_blur(x, [7, 7], [sigma, sigma]), (1.0, 2.0)),
    "contrast times": (F.adjust_contrast, (0.5, 0.25)),
    "shift, pixels": (_shift, (2.0, 4.0)),
    "rotation, degrees": (lambda x, angle: F.rotate(x, angle, F.InterpolationMode.BILINEAR), (10.0, 20.0)),
}
"""Changes of images from 0 to 1, each at two strengths. A shift wraps around at the edges."""

STEPS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]


@torch.no_grad()
def measure(weights: Path, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy on every change, and the share of images whose class is unchanged after a shift by one pixel."""
    network, facts = load_model(weights)
    normalised = normalise(tuple(facts["mean"]), tuple(facts["std"]))

    def guesses(x: Tensor) -> Tensor:
        return torch.cat([network(normalised(part)).argmax(1) for part in x.split(250)])

    plain = guesses(images)
    found = {"clean": (plain == labels).float().mean().item()}
    for name, (change, amounts) in CHANGES.items():
        for amount in amounts:
            right = guesses(change(images, amount)) == labels
            found[f"{name} {amount:g}"] = right.float().mean().item()
    same = [(guesses(torch.roll(images, step, (2, 3))) == plain).float().mean().item() for step in STEPS[::2]]
    found["same class after one pixel"] = statistics.mean(same)
    return found


def study(folder: Path, plan: StudyPlan) -> dict[str, Any]:
    """Of every network in a study that the page compares, by its name, and of every seed."""
    source = open_source(Path(plan.recipe["data"]))
    fit = fit_transform(plan.recipe["image_size"])
    order = torch.randperm(len(source.val), generator=torch.Generator().manual_seed(0))[:IMAGES].tolist()
    images = torch.stack([fit(source.val.read(i)) for i in order]).float() / 255
    labels = torch.tensor([source.val.label(i) for i in order])
    found: dict[str, Any] = {}
    for training in plan.trainings({}):
        weights = folder / "runs" / training.key / "model.safetensors"
        name = name_of(training.options["model_options"])
        if name in NETWORKS and weights.is_file():
            found.setdefault(name, {})[str(training.seed)] = measure(weights, images, labels)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.robustness")
    parser.add_argument("--work", type=Path, required=True, help="folder of the studies")
    work = parser.parse_args().work
    found: dict[str, Any] = {"images": IMAGES}
    for name in STUDIES:
        folder = work / "studies" / name
        if (folder / "plan.json").is_file():
            found[name] = study(folder, read_plan(folder / "plan.json"))
    out = Path(__file__).parent / "results" / "robustness.json"
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
