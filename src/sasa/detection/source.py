"""Images with boxes from a folder in the layout of COCO or of Pascal VOC."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from ..train.errors import DataError
from ..train.images import UnreadableImage, read_image
from .coco import AnnotatedImage, Annotations, check_coco, read_coco
from .problems import NO_ANNOTATION, NO_FILE
from .voc import voc_to_coco

Target = dict[str, Tensor]
"""Target of one image: ``boxes`` (n, 4) float32, left, top, right, bottom in pixels; ``labels`` (n,) int64 from 0;
``area`` (n,) float32; ``iscrowd`` (n,) int64; ``image_id`` () int64.
"""


@dataclass(frozen=True)
class BoxedImages:
    """Images in files, with their boxes.

    Args:
        images: with their boxes.
        training: drop boxes around crowds, which only mark where detections are not counted as errors.
    """

    images: list[AnnotatedImage]
    training: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Any:
        """The image in RGB, upright.

        Raises:
            UnreadableImage: it can't be read, or its size differs from the annotated one.
        """
        listed = self.images[index]
        image = read_image(listed.file)
        if image.size != (listed.width, listed.height):
            width, height = image.size
            raise UnreadableImage(
                str(listed.file), f"annotated as {listed.width} x {listed.height} pixels, it has {width} x {height}"
            )
        return image

    def label(self, index: int) -> Target:
        """Its boxes."""
        listed = self.images[index]
        boxes = [box for box in listed.boxes if not (self.training and box.crowd)]
        return {
            "boxes": torch.tensor([box.corners for box in boxes], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([box.label for box in boxes], dtype=torch.int64),
            "area": torch.tensor([box.area for box in boxes], dtype=torch.float32),
            "iscrowd": torch.tensor([int(box.crowd) for box in boxes], dtype=torch.int64),
            "image_id": torch.tensor(listed.number),
        }

    def name(self, index: int) -> str:
        """Its file."""
        return str(self.images[index].file)


class BoxSource(NamedTuple):
    """Images with boxes to train and validate on; the attributes are those of :class:`sasa.train.sources.Source`.

    Attributes:
        category_ids: ids of the classes in COCO's files.
    """

    train: BoxedImages
    val: BoxedImages
    classes: list[str]
    category_ids: list[int]
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    skipped: int = 0


def open_boxes(folder: Path | None, strict: bool = False) -> BoxSource:
    """Images with boxes below ``folder``.

    Args:
        folder: COCO's layout: ``annotations/instances_train*.json`` and ``instances_val*.json``, the images in a folder
            with the part's name (``train2017``), next to it or in ``images``. Or Pascal VOC's: ``Annotations``,
            ``JPEGImages``, ``ImageSets/Main/train.txt`` and ``val.txt``.
        strict: reject what is otherwise dropped with a warning.

    Raises:
        DataError: there is nothing usable or, with ``strict``, anything is wrong.
    """
    if folder is None or not folder.is_dir():
        raise DataError(f"data: expected a folder of images with boxes for a detector, got {folder}")
    if (folder / "annotations").is_dir():
        train, val = _coco(folder, strict)
    elif (folder / "Annotations").is_dir():
        train, val = _voc(folder, strict)
    else:
        raise DataError(f"data: expected annotations (COCO) or Annotations (Pascal VOC) in {folder}, found neither")
    classes = list(train.categories.values())
    sets = BoxedImages(train.images, training=True), BoxedImages(val.images)
    kinds = (NO_FILE, NO_ANNOTATION)
    skipped = sum(part.problems.counts.get(kind, 0) for part in (train, val) for kind in kinds)
    return BoxSource(*sets, classes, list(train.categories), skipped=skipped)


def _coco(folder: Path, strict: bool) -> tuple[Annotations, Annotations]:
    parts: list[tuple[Path, Path]] = []
    for part in ("train", "val"):
        files = sorted((folder / "annotations").glob(f"instances_{part}*.json"))
        if len(files) != 1:
            listed = ", ".join(file.name for file in files) or "none"
            raise DataError(f"data: expected one instances_{part}*.json in {folder / 'annotations'}, got {listed}")
        name = files[0].stem.removeprefix("instances_")
        places = [folder / name, folder / "images" / name]
        images = next((place for place in places if place.is_dir()), None)
        if images is None:
            raise DataError(f"data: expected the images of {files[0].name} in {places[0]} or {places[1]}, got neither")
        parts.append((files[0], images))
    train = read_coco(*parts[0], strict=strict)
    return train, read_coco(*parts[1], train.categories, strict=strict)


def _voc(folder: Path, strict: bool) -> tuple[Annotations, Annotations]:
    images = folder / "JPEGImages"
    found, noted = voc_to_coco(folder, "train")
    train = check_coco(found, f"{folder} (train)", images, found_problems=noted, strict=strict)
    found, noted = voc_to_coco(folder, "val", list(train.categories.values()))
    return train, check_coco(found, f"{folder} (val)", images, train.categories, found_problems=noted, strict=strict)
