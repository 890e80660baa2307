"""Images, one training run, and its evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor

from ..results import Figures

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EVALUATED = 250  # images at a time

Labelled = tuple[Tensor, Tensor]  # (N, 3, H, W) of uint8, and labels


@dataclass(frozen=True)
class FineTuning:
    """How every network is trained."""

    first_stage: int = 3  # attention is in this stage and those after it
    train_images: int = 1_536
    held_out: int = 2_000  # training images used only to choose the learning rate
    epochs: int = 2
    batch: int = 64
    rates: tuple[float, ...] = (0.001, 0.003, 0.01)
    tuning_seed: int = 100
    seeds: tuple[int, ...] = (0, 1, 2)
    momentum: float = 0.9
    weight_decay: float = 1e-4
    shift: int = 4  # maximum shift of an image in pixels


def read(folder: Path) -> Labelled:
    """All images of a folder of classes."""
    pairs = list(ImageFolder(folder, PILToTensor()))
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def normalised(images: Tensor) -> Tensor:
    """Images normalised as in the network's training."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return ((images / 255 - mean) / deviation).contiguous(memory_format=torch.channels_last)


def augmented(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Each shifted by up to ``shift`` pixels, padded with black, and half of them mirrored."""
    count, _, height, width = images.shape
    rows, cols = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator)
    rows, cols = rows + torch.arange(height), cols + torch.arange(width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    cols = torch.where(mirrored, cols.flip(1), cols)
    padded = F.pad(images, (shift,) * 4)
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], cols[:, None]].permute(0, 3, 1, 2)


@torch.inference_mode()
def logits(network: nn.Module, images: Tensor) -> Tensor:
    """Logits of all images, in the network's dtype."""
    dtype = next(network.parameters()).dtype
    return torch.cat([network(normalised(some).to(dtype)) for some in images.split(EVALUATED)])


def evaluate(network: nn.Module, data: Labelled) -> Figures:
    """Accuracy and loss in evaluation mode."""
    images, labels = data
    found = logits(network.eval(), images)
    top1 = (found.argmax(1) == labels).double().mean().item()
    return {"top1": top1, "loss": F.cross_entropy(found, labels).item()}


def fine_tune(
    network: nn.Module,
    train: Labelled,
    val: Labelled,
    recipe: FineTuning,
    rate: float,
    seed: int,
    say: Callable[[str], object],
) -> list[Figures]:
    """Train; returns the evaluation after each epoch. The order of images depends only on the seed."""
    images, labels = train
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    steps = math.ceil(len(images) / recipe.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * steps)
    epochs = []
    for epoch in range(1, recipe.epochs + 1):
        network.train()
        began, losses = time.perf_counter(), 0.0
        for step, chosen in enumerate(torch.randperm(len(images), generator=generator).split(recipe.batch), 1):
            batch = normalised(augmented(images[chosen], recipe.shift, generator))
            loss = F.cross_entropy(network(batch), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses += loss.item() * len(chosen)
            if step % 10 == 0:
                say(f"epoch {epoch} of {recipe.epochs}, step {step} of {steps}: loss {loss.item():.3f}")
        seconds = time.perf_counter() - began
        own = {"epoch": epoch, **evaluate(network, val), "train_loss": losses / len(images), "seconds": seconds}
        say(f"epoch {epoch}: {own['top1']:.2%}, loss {own['loss']:.4f}, {seconds:.0f} s\n")
        epochs.append(own)
    return epochs
