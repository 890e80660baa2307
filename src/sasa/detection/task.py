"""The training engine's interface to detection."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..train.data import ImageData
from ..train.errors import OptionError
from ..train.module import Trained
from ..train.predict import Rows
from ..train.recipe import Recipe
from ..train.task import Classification
from ..train.transforms import Transform
from .data import BLANK, BoxData, to_bytes
from .module import SUMMARY, Detector
from .predict import Detections, Finder
from .source import BoxSource, open_boxes

LONGER = 1333 / 800
"""Maximum longer side of an image relative to ``image_size``, as in torchvision; ``max_size`` overrides it."""


@dataclass(frozen=True)
class DetectionResult:
    """The result of training a detector.

    Attributes:
        model: name of the network.
        ap: COCO's average precision after the last epoch, over overlaps of 0.5 to 0.95, from 0 to 1.
        ap50: at an overlap of 0.5.
        parameters: of the network.
        flops: of the forward of one square image of the recipe's size; a multiply-add is 2.
        seconds_per_epoch: of training, validation not included.
        epochs: passes over the training images.
        train_images: images trained on.
        val_images: images validated on.
        skipped_images: unreadable images left out.
        ap75: at an overlap of 0.75.
        ap_small: of boxes below 32 x 32 pixels; -1 if there are none.
        ap_medium: of those below 96 x 96.
        ap_large: of the rest.
        ar1: average recall with one detection per image.
        ar10: with ten.
        ar100: with a hundred.
        ar_small: likewise, by size.
        ar_medium: likewise.
        ar_large: likewise.
    """

    model: str
    ap: float
    ap50: float
    parameters: int
    flops: int
    seconds_per_epoch: float
    epochs: int
    train_images: int
    val_images: int
    skipped_images: int
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float

    def __str__(self) -> str:
        return f"{self.model}: AP {self.ap:.1%}, AP50 {self.ap50:.1%} on {self.val_images} validation images"


class Detection(Classification):
    """Object detection."""

    data: type[ImageData] = BoxData
    result: Any = DetectionResult
    curve = ("val_ap", "validation AP")

    def open(self, folder: Path | None, strict: bool) -> BoxSource:
        """The images and boxes in a folder."""
        return open_boxes(folder, strict)

    def facts(self, recipe: Recipe, source: Any) -> dict[str, Any]:
        """The metadata needed to use a trained detector."""
        return super().facts(recipe, source) | {"train_sizes": recipe.train_sizes, "category_ids": source.category_ids}

    def build(self, facts: dict[str, Any]) -> nn.Module:
        """The detector, with torchvision's resizing to the recipe's size; training draws from ``train_sizes`` too."""
        from ..models import retinanet

        options = dict(facts["model_options"])
        size = facts["image_size"]
        given = {"num_classes", "min_size", "image_mean", "image_std"} & set(options)
        if given:
            raise OptionError(f"expected image_size and the data to say it, got {', '.join(sorted(given))}")
        options.setdefault("max_size", round(LONGER * max([size, *facts.get("train_sizes", [])])))
        options |= {"image_mean": list(facts["mean"]), "image_std": list(facts["std"])}
        # Outside training, torchvision uses the last one.
        options["min_size"] = (*facts.get("train_sizes", []), size)
        return retinanet(num_classes=len(facts["classes"]), **options)

    def module(self, network: nn.Module, source: Any, recipe: Recipe, steps: int) -> Trained:
        """The module that Lightning trains and validates."""
        return Detector(network, recipe, steps)

    def figures(self, metrics: dict[str, float]) -> dict[str, float]:
        """COCO's twelve metrics."""
        return {name: metrics[f"val_{name}"] for name in SUMMARY}

    def prediction(
        self,
        network: nn.Module,
        facts: dict[str, Any],
        parts: Path,
        top_k: int,
        pictures: Path | None,
        threshold: float,
    ) -> tuple[Rows, Any, Transform, tuple[int, int, int]]:
        """The parts that ``sasa predict`` needs; images keep their sizes."""
        table = Detections(parts, facts["classes"], facts["category_ids"], pictures, threshold)
        return table, Finder(network), to_bytes, (3, BLANK, BLANK)

    def summary(self, figures: dict[str, Any]) -> str:
        """COCO's table, as its own tools print it."""
        rows = []
        for name, (kind, overlap, area, most) in TABLE.items():
            title = "Average Precision" if kind == "AP" else "Average Recall   "
            of = f"IoU={overlap:<9} | area={area:>6} | maxDets={most:>3}"
            rows.append(f" {title}  ({kind}) @[ {of} ] = {figures[name]:.3f}")
        return "\n" + "\n".join(rows) + "\n"


ALL = "0.50:0.95"
TABLE = {
    "ap": ("AP", ALL, "all", 100),
    "ap50": ("AP", "0.50", "all", 100),
    "ap75": ("AP", "0.75", "all", 100),
    "ap_small": ("AP", ALL, "small", 100),
    "ap_medium": ("AP", ALL, "medium", 100),
    "ap_large": ("AP", ALL, "large", 100),
    "ar1": ("AR", ALL, "all", 1),
    "ar10": ("AR", ALL, "all", 10),
    "ar100": ("AR", ALL, "all", 100),
    "ar_small": ("AR", ALL, "small", 100),
    "ar_medium": ("AR", ALL, "medium", 100),
    "ar_large": ("AR", ALL, "large", 100),
}
