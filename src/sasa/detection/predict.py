"""A detector's predictions for a folder of images, as COCO results and as pictures."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import lightning
import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_dtype, to_pil_image
from torchvision.utils import draw_bounding_boxes

from ..train.batch import Batch
from ..train.errors import OutputError
from ..train.predict import Rows

COLOURS = ("red", "blue", "green", "orange", "purple", "teal", "magenta", "brown")
NAMED = 10
"""Maximum number of unreadable images that are named."""


class Finder(lightning.LightningModule):
    """Boxes of the objects."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Tensor]]:
        """Boxes, labels and scores of each image."""
        return self.network([to_dtype(image, torch.float32, scale=True) for image in batch.images])


class Detections(Rows):
    """Rows of path, detections (JSON of ``[category_id, bbox, score]``) and error.

    Args:
        parts: where the rows are collected.
        classes: names of the classes.
        category_ids: their ids.
        pictures: folder for the images with their boxes, or None.
        threshold: minimum score of the boxes that are drawn.
    """

    verb = "searched"

    def __init__(
        self,
        parts: Path,
        classes: list[str],
        category_ids: list[int],
        pictures: Path | None,
        threshold: float,
    ) -> None:
        super().__init__(parts, classes, 0)
        self.header = ["path", "detections", "error"]
        self.category_ids, self.pictures, self.threshold = category_ids, pictures, threshold

    def made(self, batch: Batch, prediction: Any) -> Iterator[list[str]]:
        """The rows of a batch; its pictures are drawn first."""
        for image, name, reason, found in zip(batch.images, batch.names, batch.unreadable, prediction, strict=True):
            if reason:
                yield [name, "", reason]
                continue
            if self.pictures is not None:
                self._draw(image, name, found)
            boxes = [[x, y, right - x, bottom - y] for x, y, right, bottom in found["boxes"].tolist()]
            rows = [
                [self.category_ids[label], [round(side, 2) for side in box], round(score, 5)]
                for label, box, score in zip(found["labels"].tolist(), boxes, found["scores"].tolist(), strict=True)
            ]
            yield [name, json.dumps(rows), ""]

    def _draw(self, image: Tensor, name: str, found: dict[str, Tensor]) -> None:
        shown = found["scores"] >= self.threshold
        labels = found["labels"][shown].tolist()
        titles = [f"{self.classes[n]} {s:.2f}" for n, s in zip(labels, found["scores"][shown].tolist(), strict=True)]
        if labels:
            colours = [COLOURS[label % len(COLOURS)] for label in labels]
            image = draw_bounding_boxes(image, found["boxes"][shown], titles, colours, width=2)  # type: ignore[arg-type]
        path = Path(f"{self.pictures}") / f"{name}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(image.cpu()).save(path)
        except OSError as error:
            raise OutputError(f"pictures: can't write {path}: {error}") from error

    def _is_whole(self, row: Any) -> bool:
        if not (isinstance(row, list) and len(row) == 3 and all(isinstance(cell, str) for cell in row) and row[0]):
            return False
        if row[2]:
            return not row[1]
        return all(
            number in self.category_ids and len(box) == 4 and all(map(math.isfinite, box)) and 0 <= score <= 1
            for number, box, score in json.loads(row[1])
        )

    def write_to(self, file: IO[str]) -> int:
        """Write the list of results; returns the number of images."""
        paths, unreadable = [], []
        for path, _, reason in self:
            paths.append(path)
            if reason:
                unreadable.append(f"{path} ({reason})")
        if unreadable:
            listed = "; ".join(unreadable[:NAMED]) + ("; …" if len(unreadable) > NAMED else "")
            warnings.warn(f"{len(unreadable)} images can't be read: {listed}", stacklevel=2)
        numbers = _numbers(paths)
        file.write("[")
        before = "\n"
        for path, found, _ in self:
            for category, box, score in json.loads(found or "[]"):
                result = {"image_id": numbers[path], "category_id": category, "bbox": box, "score": score}
                file.write(before + json.dumps(result | {"file_name": path}))
                before = ",\n"
        file.write("\n]\n")
        return len(paths)


def _numbers(paths: list[str]) -> dict[str, int]:
    """Ids of the images: their names if those are numbers, otherwise their positions."""
    stems = [Path(path).stem for path in paths]
    own = {int(stem) for stem in stems if stem.isascii() and stem.isdecimal() and len(stem) < 16}
    if len(own) == len(paths):
        return {path: int(stem) for path, stem in zip(paths, stems, strict=True)}
    return {path: place for place, path in enumerate(paths, 1)}
