"""The module that Lightning trains: a detector with its losses and COCO's average precisions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision

from ..train.batch import Batch
from ..train.module import Trained
from ..train.recipe import Recipe
from .data import NO_IMAGE

SUMMARY = {
    "ap": "map",
    "ap50": "map_50",
    "ap75": "map_75",
    "ap_small": "map_small",
    "ap_medium": "map_medium",
    "ap_large": "map_large",
    "ar1": "mar_1",
    "ar10": "mar_10",
    "ar100": "mar_100",
    "ar_small": "mar_small",
    "ar_medium": "mar_medium",
    "ar_large": "mar_large",
}
"""COCO's twelve metrics, with torchmetrics' names for them; -1 if there are no boxes of that size."""


class Detector(Trained):
    """The sum of a detector's losses; COCO's metrics over all processes, padding not counted.

    Logs ``train_loss``; ``val_ap``, ``val_ap50`` and the rest of :data:`SUMMARY`.

    Args:
        network: follows torchvision's convention: for a list of images (3, H, W) from 0 to 1, it returns a dict of
            losses in training, given targets, and otherwise boxes, labels and scores of each image.
        recipe: how to train.
        steps: total number of steps, for the schedule.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, steps: int) -> None:
        super().__init__(network, recipe, steps)
        self.precision_metric = MeanAveragePrecision(backend="pycocotools")
        self.precision_metric.warn_on_many_detections = False  # only 100 per image count, as in COCO

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        losses: dict[str, Tensor] = self.network(batch.images, batch.labels)
        loss = torch.stack(list(losses.values())).sum()
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True}
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch.images), **options)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Record detections and ground truth."""
        targets: Any = batch.labels
        found = self.network(batch.images)
        for place, target in enumerate(targets):
            if target["image_id"] == NO_IMAGE:
                # Nothing to find and nothing found, which doesn't affect the metrics. Skipping it would deadlock:
                # torchmetrics gathers image by image, so all processes must have the same number.
                found[place] = {name: values[:0] for name, values in found[place].items()}
        self.precision_metric.update(found, targets)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over all processes."""
        measured = self.precision_metric.compute()
        self.precision_metric.reset()
        for name, own in SUMMARY.items():
            self.log(f"val_{name}", measured[own].float(), prog_bar=name == "ap", sync_dist=True)
