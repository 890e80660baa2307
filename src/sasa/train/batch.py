"""What a loader gives: images with labels, names, and what could not be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .images import UnreadableImage
from .order import IMAGE, seed_everything
from .transforms import Transform

IGNORED = -1
"""Label of what is in a batch but no image: padding, and images that can't be read."""


class Batch(NamedTuple):
    """A batch as it comes from the loader.

    Attributes:
        images: (B, C, S, S) bytes; after the transfer to the device, normalised floats.
        labels: (B,) classes, or :data:`IGNORED`; with mixup, (B, classes) shares of each.
        names: what to call each image.
        unreadable: of each image, "", or the file that could not be read and why.
    """

    images: Tensor
    labels: Tensor
    names: list[str]
    unreadable: list[str]


class Taken(NamedTuple):
    """One image of a batch: the same four."""

    image: Tensor
    label: int
    name: str
    unreadable: str = ""


def collate(samples: list[Taken]) -> Batch:
    """Samples to a batch."""
    images, labels, names, unreadable = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), list(names), list(unreadable))


class Candidate(NamedTuple):
    """An image that may be taken, once it is read; ``number`` is what its draws follow from."""

    name: str
    label: int
    number: int
    read: Callable[[], Any]


@dataclass(frozen=True)
class Preparation:
    """From images to what stands in a batch, with random draws that follow from seed, epoch and image alone.

    An image that can't be read is a blank one labelled :data:`IGNORED` in validation; in training the next readable one
    takes its place. Both are reported in the batch.

    Args:
        fit: brings an image to its size.
        vary: changes it at random; None: doesn't.
        blank: (C, S, S) bytes: what stands for an image that is not there.
        seed: of the draws.
        training: whether unreadable images are replaced.
        strict: raise for them instead.
    """

    fit: Transform
    vary: Transform | None
    blank: Tensor
    seed: int = 0
    training: bool = False
    strict: bool = False

    def take(self, candidates: Iterable[Candidate], epoch: int) -> Taken:
        """The first of the candidates, or in training the first that can be read."""
        unreadable = ""
        for name, label, number, read in candidates:
            try:
                image = read()
            except UnreadableImage as error:
                if self.strict:
                    raise
                unreadable = unreadable or str(error)
                if self.training:
                    continue
                return Taken(self.blank, IGNORED, name, unreadable)
            image = self.fit(image)
            if self.vary is not None:
                seed_everything(IMAGE, self.seed, epoch, number)
                image = self.vary(image)
            return Taken(image, label, name, unreadable)
        raise UnreadableImage("data", "not one of the images can be read")
