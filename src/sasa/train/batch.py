"""A loader's output: images with labels, names, and read errors."""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .images import UnreadableImage
from .order import IMAGE, PADDING, seed_everything
from .sources import Images
from .transforms import Transform

IGNORED = -1
"""Label of batch entries that are not images: padding, and images that can't be read."""


class Batch(NamedTuple):
    """A batch as produced by the loader.

    Attributes:
        images: (B, C, S, S) bytes; after the transfer to the device, normalised floats.
        labels: (B,) classes, or :data:`IGNORED`; with mixup, (B, classes) shares of each.
        names: what to call each image.
        unreadable: for each image, "", or the file that could not be read and why.
    """

    images: Tensor
    labels: Tensor
    names: list[str]
    unreadable: list[str]


class Taken(NamedTuple):
    """One image of a batch: the same four fields."""

    image: Tensor
    label: Any
    name: str
    unreadable: str = ""


def collate(samples: list[Taken]) -> Batch:
    """Samples to a batch."""
    images, labels, names, unreadable = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), list(names), list(unreadable))


class LabelledImages(Dataset):
    """Looks up images by (epoch, index), with random draws determined by seed, epoch and index alone.

    In validation an unreadable image becomes a blank one labelled :data:`IGNORED`; in training the next readable one
    takes its place. Both are reported in the batch.

    Args:
        images: source of images.
        fit: resizes an image.
        vary: augments it at random; None for no augmentation.
        blank: (C, S, S) bytes: the stand-in for a missing image.
        seed: of the draws.
        training: whether unreadable images are replaced.
        strict: raise for them instead.
    """

    nothing: Any = IGNORED  # the label of entries that are not images

    def __init__(
        self,
        images: Images,
        fit: Transform | None,
        vary: Transform | None,
        blank: Tensor,
        *,
        seed: int = 0,
        training: bool = False,
        strict: bool = False,
    ) -> None:
        self.images, self.fit, self.vary, self.blank = images, fit, vary, blank
        self.seed, self.training, self.strict = seed, training, strict

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: tuple[int, int] | int) -> Taken:
        epoch, index = (0, place) if isinstance(place, int) else place
        if index == PADDING:
            return Taken(self.blank, self.nothing, "")
        unreadable = ""
        for number in chain(range(index, len(self)), range(index)):
            name = self.images.name(number)
            try:
                image = self.images.read(number)
            except UnreadableImage as error:
                if self.strict:
                    raise
                unreadable = unreadable or str(error)
                if self.training:
                    continue
                return Taken(self.blank, self.nothing, name, unreadable)
            return Taken(*self.transformed(image, number, (epoch, index)), name, unreadable)
        raise UnreadableImage("data", "not one of the images can be read")

    def transformed(self, image: Any, number: int, place: tuple[int, int]) -> tuple[Tensor, Any]:
        """An image that was read, as the network expects it, and its label; ``place`` determines random draws."""
        if self.fit is not None:
            image = self.fit(image)
        if self.vary is not None:
            seed_everything(IMAGE, self.seed, *place)
            image = self.vary(image)
        return image, self.images.label(number)
