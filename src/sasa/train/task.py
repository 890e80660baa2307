"""The engine's interface to a task: its images, the module trained on them, and the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .._extras import require
from ..models import create_model
from .data import ImageData
from .errors import OptionError
from .folder import Result
from .module import Classifier, ShardedClassifier, Trained
from .predict import Rows
from .predictor import Predictor
from .recipe import DETECTORS, Recipe
from .sources import Source, open_source
from .transforms import Transform, fit_transform, normalise


class Classification:
    """Image classification. Other tasks inherit what they share with it.

    Attributes:
        data: batches of the images, a Lightning data module.
        result: the class of a run's result.
        curve: the column of ``metrics.csv`` that is plotted, and its label.
    """

    data: type[ImageData] = ImageData
    result: Any = Result
    curve = ("val_top1", "validation top-1 accuracy")

    def open(self, folder: Path | None, strict: bool) -> Any:
        """The images in a folder."""
        return open_source(folder, strict)

    def build(self, facts: dict[str, Any]) -> nn.Module:
        """The network described by a run's :meth:`facts`, with fresh parameters."""
        return create_model(facts["model"], len(facts["classes"]), facts["in_chans"], **facts["model_options"])

    def facts(self, recipe: Recipe, source: Source) -> dict[str, Any]:
        """The metadata needed to use a trained network."""
        facts = {"model": recipe.model, "model_options": recipe.model_options, "classes": source.classes}
        facts |= {"in_chans": source.channels, "image_size": recipe.image_size, "crop_pct": recipe.crop_pct}
        return facts | {"mean": source.mean, "std": source.std}

    def module(self, network: nn.Module, source: Source, recipe: Recipe, steps: int) -> Trained:
        """The module that Lightning trains and validates."""
        build = ShardedClassifier if recipe.strategy == "fsdp" else Classifier
        return build(network, len(source.classes), recipe, steps)

    def figures(self, metrics: dict[str, float]) -> dict[str, float]:
        """The measurements on validation images, as stored in results."""
        return {name.removeprefix("val_") if "top" in name else name: metrics[name] for name in METRICS}

    def prediction(
        self,
        network: nn.Module,
        facts: dict[str, Any],
        parts: Path,
        top_k: int,
        pictures: Path | None,
        threshold: float,
    ) -> tuple[Rows, Any, Transform, tuple[int, int, int]]:
        """The table of ``sasa predict``, the module producing its rows, the image transform, and its output shape.

        Raises:
            OptionError: pictures are requested.
        """
        if pictures is not None:
            raise OptionError(f"pictures: expected it with a detector, got it with {facts['model']}")
        size = facts["image_size"]
        predictor = Predictor(network, normalise(tuple(facts["mean"]), tuple(facts["std"])))
        fit = fit_transform(size, facts["crop_pct"])
        return Rows(parts, facts["classes"], top_k), predictor, fit, (facts["in_chans"], size, size)

    def summary(self, figures: dict[str, Any]) -> str:
        """The figures in words."""
        return f"top-1 {figures['top1']:.2%}, top-5 {figures['top5']:.2%}, loss {figures['val_loss']:.4f}"


METRICS = ("val_loss", "val_top1", "val_top5")


def build_network(recipe: Recipe, source: Any) -> nn.Module:
    """The network that a recipe names, for the classes of a source.

    Raises:
        OptionError: the network rejects its options.
    """
    task = task_of(recipe.model)
    try:
        return task.build(task.facts(recipe, source))
    except Exception as error:
        if not recipe.model_options:
            raise
        raise OptionError(f"model_options: {error}") from error


def task_of(model: str) -> Classification:
    """The task for a network of that name."""
    if model in DETECTORS:
        return require("sasa.detection.task", "detection").Detection()
    return Classification()
