"""Batches of images with boxes: as in classification, but images keep their sizes and labels are boxes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..train.batch import Batch, LabelledImages, Taken
from ..train.data import ImageData
from ..train.order import IMAGE, seed_everything
from .source import Target

NO_IMAGE = -1
"""``image_id`` of batch entries that are not images: padding, and images that can't be read."""

BLANK = 32
"""Side in pixels of the stand-in for a missing image."""

to_bytes = v2.Compose([v2.ToImage(), v2.ToPureTensor()])
"""An image as bytes (3, H, W)."""


def no_boxes() -> Target:
    """The target of an entry that is not an image."""
    empty = torch.zeros(0, dtype=torch.int64)
    target = {"boxes": torch.zeros(0, 4), "labels": empty, "area": torch.zeros(0), "iscrowd": empty}
    return target | {"image_id": torch.tensor(NO_IMAGE)}


class BoxedSet(LabelledImages):
    """Looks up images with their boxes; transforms change both."""

    nothing = no_boxes()

    def transformed(self, image: Any, number: int, place: tuple[int, int]) -> tuple[Tensor, Target]:
        """Bytes (3, H, W) and the target."""
        pixels: Tensor = to_bytes(image)
        target: Any = self.images.label(number)
        if self.vary is not None:
            seed_everything(IMAGE, self.seed, *place)
            size: Any = tuple(pixels.shape[-2:])
            boxes: Any = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)  # type: ignore[call-overload]
            transform: Any = self.vary
            flipped, boxes = transform(tv_tensors.Image(pixels), boxes)
            pixels, target["boxes"] = flipped.as_subclass(Tensor), boxes.as_subclass(Tensor)
        return pixels, target


def collate(samples: list[Taken]) -> Batch:
    """Collate samples into a batch whose images and labels are lists."""
    images, targets, names, unreadable = zip(*samples, strict=True)
    return Batch(list(images), list(targets), list(names), list(unreadable))  # type: ignore[arg-type]


class BoxData(ImageData):
    """Batches of images of different sizes with their boxes, identical for any number of processes and workers."""

    collate = staticmethod(collate)

    def _open(self) -> None:
        source, recipe = self.source, self.recipe
        vary: Any = v2.RandomHorizontalFlip() if recipe.augment == "flip" else None
        blank = torch.zeros(source.channels, BLANK, BLANK, dtype=torch.uint8)
        options: dict[str, Any] = {"seed": recipe.seed, "training": True, "strict": recipe.strict}
        self.train_set = BoxedSet(source.train, None, vary, blank, **options)
        self.val_set = BoxedSet(source.val, None, None, blank, strict=recipe.strict)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Bytes to floats from 0 to 1; the detector itself normalises, resizes and batches."""
        dtype = torch.float64 if self.recipe.precision == "64-true" else torch.float32
        images: Any = [v2.functional.to_dtype(image, dtype, scale=True) for image in batch.images]
        return batch._replace(images=images)
