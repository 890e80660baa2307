"""What a loader gives: images with labels, names, and what could not be read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
