"""From an image to the network's input: bytes of a fixed size, then, a batch at a time, normalised floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

Transform = Callable[[Any], Tensor]


LONGEST = 50
"""Maximum aspect ratio of an image; the ends of longer ones, which no crop would include, are cut off first."""


def fit_transform(image_size: int, crop_pct: float = 1.0) -> Transform:
    """The whole image, resized and centre-cropped: (C, image_size, image_size) bytes."""
    resize = v2.Resize(round(image_size / crop_pct), interpolation=InterpolationMode.BILINEAR, antialias=True)
    return v2.Compose([_shortened, v2.ToImage(), resize, v2.CenterCrop(image_size), v2.ToPureTensor()])


def _shortened(image: Any) -> Any:
    """Crop the ends of a very elongated image: resized by its shorter side, it would exhaust memory."""
    size = v2.functional.get_size(image)
    most = LONGEST * min(size)
    return image if max(size) <= most else v2.functional.center_crop(image, [min(side, most) for side in size])


def shift_transform(image_size: int) -> Transform:
    """Shift bytes by up to a fourteenth of their side and flip them left to right, at random."""
    return v2.Compose([v2.RandomCrop(image_size, padding=max(1, image_size // 14)), v2.RandomHorizontalFlip()])


class ImageNetTransform:
    """Timm's random resized crop and flip, with an augmentation policy if given; otherwise colours are unchanged."""

    def __init__(self, image_size: int, auto_augment: str | None, mean: tuple[float, ...]) -> None:
        jitter = 0.4 if auto_augment else 0.0
        options = {"auto_augment": auto_augment, "color_jitter": jitter, "mean": mean}
        self.crop: Any = create_transform(image_size, True, use_prefetcher=True, **options)  # i.e. to bytes

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, image_size, image_size) bytes."""
        return torch.as_tensor(self.crop(image))


def normalise(mean: tuple[float, ...], std: tuple[float, ...]) -> Transform:
    """Bytes to floats of mean 0 and deviation 1."""
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
