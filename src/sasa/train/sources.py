"""Sources of images: the package, IDX files, folders of images, Hugging Face datasets, WebDataset shards."""

from __future__ import annotations

import tempfile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from rich.progress import track
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.datasets import FashionMNIST
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor
from torchvision.datasets.utils import extract_archive

from .errors import DataError
from .hugging_face import is_hugging_face, open_hugging_face
from .images import UnreadableImage, read_image
from .shards import is_sharded, open_shards
from .walk import VALIDATION_NAMES, subfolders, walk

CHECKED_BEFOREHAND = 10_000
"""Folders with more images than this are not fully read before training: a bad image is found when it is reached."""


class Images(Protocol):
    """Labelled images, accessed one by one."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def read(self, index: int) -> Any:
        """The image, as a PIL image or bytes (C, H, W); raises :class:`UnreadableImage`."""
        ...

    def label(self, index: int) -> int:
        """Its class."""
        ...

    def name(self, index: int) -> str:
        """Its name in messages: its file, if it has one."""
        ...


class Source(NamedTuple):
    """Images to train and validate on, before any transform.

    Attributes:
        train: training images.
        val: validation images.
        classes: names, in the order of the labels.
        channels: 1 for grey, 3 for RGB.
        mean: of each channel of the training set, with pixels from 0 to 1.
        std: likewise.
        skipped: unreadable images left out so far.
    """

    train: Images
    val: Images
    classes: list[str]
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    skipped: int = 0


@dataclass(frozen=True)
class TensorImages:
    """Images in memory: (N, 1, H, W) bytes with N labels, named by ``part`` and their number."""

    images: Tensor
    labels: Tensor
    part: str

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        """(1, H, W) bytes."""
        return self.images[index]

    def label(self, index: int) -> int:
        """Its class."""
        return int(self.labels[index])

    def name(self, index: int) -> str:
        """Its part and number."""
        return f"{self.part}/{index}"


@dataclass(frozen=True)
class FileImages:
    """Images in files, with their classes."""

    samples: list[tuple[str, int]]

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> Any:
        """The image in RGB, upright."""
        return read_image(self.samples[index][0])

    def label(self, index: int) -> int:
        """The index of its folder among the classes."""
        return self.samples[index][1]

    def name(self, index: int) -> str:
        """Its file."""
        return self.samples[index][0]


def open_source(folder: Path | None, strict: bool = False) -> Source:
    """The packaged Fashion-MNIST subset for None, else the images in ``folder``.

    Args:
        folder: holds ``train-images-idx3-ubyte`` and its three companions (plain or .gz); or a Hugging Face dataset
            saved to disk; or WebDataset shards; or ``train`` and ``val``, each with one folder of images per class; or
            one folder of images per class, of which every fifth image is held out for validation.
        strict: reject unreadable images instead of skipping them with a warning.

    Raises:
        DataError: there is nothing usable, an image is unreadable in strict mode, or the classes of train and val
            differ.
    """
    if folder is None:
        return _packaged()
    if not folder.is_dir():
        raise DataError(f"data: expected a folder, got {folder}")
    try:
        source = _open_folder(folder, strict)
    except OSError as error:
        raise DataError(f"data: {folder} can't be read: {error}") from error
    if len(source.classes) < 2:
        raise DataError(f"data: expected two classes or more in {folder}, found {', '.join(source.classes)} alone")
    return source


def _open_folder(folder: Path, strict: bool) -> Source:
    if any(folder.glob("train-images*idx3-ubyte*")):
        return _idx_files(folder)
    if is_hugging_face(folder):
        return Source(*open_hugging_face(folder))
    if is_sharded(folder):
        train, val, classes = open_shards(folder, strict)
        return Source(train, val, classes, skipped=train.skipped + val.skipped)
    if (folder / "train").is_dir():
        return _split_folders(folder, strict)
    return _one_folder(folder, strict)


def _packaged() -> Source:
    file = resources.files("sasa.train") / "fashion_mnist" / "subset.npz"
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    train, val = (TensorImages(tensors[f"{p}_images"][:, None], tensors[f"{p}_labels"], p) for p in ("train", "val"))
    return _in_memory(train, val, list(FashionMNIST.classes))


def _in_memory(train: TensorImages, val: TensorImages, classes: list[str]) -> Source:
    pixels = train.images.float() / 255
    mean, std = pixels.mean().item(), pixels.std().item()
    if not std > 0:  # dividing by 0 gives NaN
        raise DataError("data: expected training images that are not all of one grey")
    return Source(train, val, classes, 1, (mean,), (std,))


def _idx_files(folder: Path) -> Source:
    def read(name: str, dimensions: int) -> Tensor:
        names = [name, f"{name}.gz", name.replace("-idx", ".idx"), f"{name.replace('-idx', '.idx')}.gz"]
        path = next((folder / candidate for candidate in names if (folder / candidate).is_file()), None)
        if path is None:
            raise DataError(f"data: expected {name} (or {name}.gz) beside the other IDX files, none in {folder}")
        try:
            with tempfile.TemporaryDirectory() as unpacked:
                plain = extract_archive(str(path), unpacked) if path.suffix == ".gz" else path
                tensor = read_sn3_pascalvincent_tensor(str(plain))
        except (AssertionError, LookupError, ValueError, RuntimeError, OSError, EOFError, zlib.error) as error:
            raise DataError(f"data: {path} is not a complete IDX file ({type(error).__name__}: {error})") from error
        if tensor.dim() != dimensions or tensor.dtype != torch.uint8:
            raise DataError(f"data: expected {dimensions} dimensions of bytes in {path}, got {tuple(tensor.shape)}")
        return tensor

    parts = []
    for part in ("train", "t10k"):
        images, labels = read(f"{part}-images-idx3-ubyte", 3), read(f"{part}-labels-idx1-ubyte", 1)
        if not len(images) or len(images) != len(labels):
            raise DataError(f"data: expected as many {part} images as labels, got {len(images)} and {len(labels)}")
        parts.append(TensorImages(images[:, None], labels, {"t10k": "val"}.get(part, part)))
    classes = int(max(part.labels.max() for part in parts)) + 1
    return _in_memory(parts[0], parts[1], [str(label) for label in range(classes)])


def _split_folders(folder: Path, strict: bool) -> Source:
    found = [folder / name for name in VALIDATION_NAMES if (folder / name).is_dir()]
    if not found:
        raise DataError(f"data: expected a folder val beside {folder / 'train'} ({', '.join(VALIDATION_NAMES)})")
    train, classes, skipped_train = _image_folder(folder / "train", strict)
    val, val_classes, skipped_val = _image_folder(found[0], strict)
    missing = sorted(set(classes) - set(val_classes))
    unknown = sorted(set(val_classes) - set(classes))
    if missing or unknown:
        raise DataError(
            f"data: expected the same class folders in {folder / 'train'} and {found[0]}; "
            f"missing from {found[0].name}: {', '.join(missing) or 'none'}, "
            f"only in {found[0].name}: {', '.join(unknown) or 'none'}"
        )
    return Source(FileImages(train), FileImages(val), classes, skipped=skipped_train + skipped_val)


def _one_folder(folder: Path, strict: bool) -> Source:
    samples, classes, skipped = _image_folder(folder, strict)
    by_class = [list(found) for _, found in groupby(samples, itemgetter(1))]
    lonely = [name for name, found in zip(classes, by_class, strict=True) if len(found) < 2]
    if lonely:
        raise DataError(f"data: expected two images or more a class, to train and to validate; one in {lonely}")
    # Every fifth image of a class, and at least one; files are sorted by name, so the split is always the same.
    train = [sample for found in by_class for place, sample in enumerate(found) if place % 5 != 1]
    val = [sample for found in by_class for sample in found[1::5]]
    return Source(FileImages(train), FileImages(val), classes, skipped=skipped)


def _image_folder(folder: Path, strict: bool) -> tuple[list[tuple[str, int]], list[str], int]:
    """The readable images below ``folder``, one folder per class, the classes, and the number of unreadable images."""
    classes = subfolders(folder)
    if not classes:
        raise DataError(f"data: expected one folder of images a class in {folder}, found no folders")
    labels = {name: label for label, name in enumerate(classes)}
    found = [(str(folder / path), labels[path.split("/")[0]]) for path in walk(folder) if "/" in path]
    found.sort(key=itemgetter(1))
    if not found:
        raise DataError(f"data: no images below {folder} (looked for {', '.join(IMG_EXTENSIONS)})")
    reasons: list[str | None] = [None] * len(found)
    if len(found) <= CHECKED_BEFOREHAND:
        with ThreadPoolExecutor() as pool:
            checks = pool.map(_why_unreadable, [path for path, _ in found])
            reasons = list(track(checks, f"Checking images in {folder.name}", len(found), transient=True))
    bad = [reason for reason in reasons if reason]
    if bad and strict:
        raise DataError(f"data: {len(bad)} of {len(found)} images can't be read: {'; '.join(bad[:10])}")
    for reason in bad:
        warnings.warn(f"skipped an image that can't be read: {reason}", stacklevel=2)
    samples = [sample for sample, reason in zip(found, reasons, strict=True) if not reason]
    empty = set(classes) - {classes[label] for _, label in samples}
    if empty:
        raise DataError(f"data: no readable images in {', '.join(str(folder / name) for name in sorted(empty))}")
    return samples, classes, len(bad)


def _why_unreadable(path: str) -> str | None:
    try:
        read_image(path)
    except UnreadableImage as error:
        return f"{path} ({error.reason})"
    return None
