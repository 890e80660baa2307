"""Where images come from: the package, IDX files, or folders of images. All give a :class:`Source`."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import track
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets import FashionMNIST, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor
from torchvision.datasets.utils import extract_archive

from .errors import DataError

Transform = Callable[[Any], Any]
MakeDataset = Callable[[Transform, Transform], Dataset]

VALIDATION_NAMES = ("val", "valid", "validation", "test")


class Source(NamedTuple):
    """Images to train and validate on, before any transform.

    Attributes:
        train: makes the training set, given two transforms of an image: one that always does the same, and one
            that is drawn anew each time the image is taken.
        val: makes the validation set, likewise.
        classes: names, in the order of the labels.
        channels: 1 for grey, 3 for RGB.
        mean: of each channel of the training set, with pixels from 0 to 1.
        std: likewise.
        skipped: unreadable images left out.
    """

    train: MakeDataset
    val: MakeDataset
    classes: list[str]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: int = 0


class TensorImages(Dataset):
    """Images in memory: (N, 1, H, W) bytes with N labels. ``fit`` is done once, on all of them together."""

    def __init__(self, images: Tensor, labels: Tensor, fit: Transform, vary: Transform) -> None:
        self.images, self.labels, self.vary = fit(images), labels, vary

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.vary(self.images[index]), int(self.labels[index])


class FolderImages(Dataset):
    """Images in files, with both transforms put on each when it is taken."""

    def __init__(self, images: Dataset, fit: Transform, vary: Transform) -> None:
        self.images, self.fit, self.vary = images, fit, vary

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return self.vary(self.fit(image)), label


def open_source(folder: Path | None, strict: bool = False) -> Source:
    """The packaged Fashion-MNIST subset for None, else the IDX files or image folders in ``folder``.

    Args:
        folder: holds ``train-images-idx3-ubyte`` and its three companions (plain or .gz); or ``train`` and ``val``,
            each with one folder of images a class; or one folder of images a class, of which every fifth image is
            kept for validation.
        strict: refuse unreadable images instead of skipping them with a warning.

    Raises:
        DataError: nothing usable there, an unreadable image in strict mode, or classes of train and val that differ.
    """
    if folder is None:
        return _packaged()
    if not folder.is_dir():
        raise DataError(f"data: expected a folder, got {folder}")
    if any(folder.glob("train-images*idx3-ubyte*")):
        return _idx_files(folder)
    if (folder / "train").is_dir():
        return _split_folders(folder, strict)
    return _one_folder(folder, strict)


def _packaged() -> Source:
    file = resources.files("sasa.train") / "fashion_mnist" / "subset.npz"
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    train, val = ((tensors[f"{part}_images"][:, None], tensors[f"{part}_labels"]) for part in ("train", "val"))
    return _in_memory(train, val, list(FashionMNIST.classes))


def _in_memory(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], classes: list[str]) -> Source:
    pixels = train[0].float() / 255
    return Source(
        train=lambda fit, vary: TensorImages(*train, fit, vary),
        val=lambda fit, vary: TensorImages(*val, fit, vary),
        classes=classes,
        channels=1,
        mean=(pixels.mean().item(),),
        std=(pixels.std().item(),),
    )


def _idx_files(folder: Path) -> Source:
    def read(name: str, dimensions: int) -> Tensor:
        names = [name, f"{name}.gz", name.replace("-idx", ".idx"), f"{name.replace('-idx', '.idx')}.gz"]
        paths = [folder / candidate for candidate in names if (folder / candidate).is_file()]
        if not paths:
            raise DataError(f"data: expected {name} (or {name}.gz) beside the other IDX files, none in {folder}")
        try:
            with tempfile.TemporaryDirectory() as unpacked:
                path = extract_archive(str(paths[0]), unpacked) if paths[0].suffix == ".gz" else paths[0]
                tensor = read_sn3_pascalvincent_tensor(str(path))
        except (AssertionError, KeyError, IndexError, ValueError, RuntimeError, OSError, EOFError) as error:
            raise DataError(f"data: {paths[0]} is not a whole IDX file ({type(error).__name__}: {error})") from error
        if tensor.dim() != dimensions or tensor.dtype != torch.uint8:
            raise DataError(f"data: expected {dimensions} dimensions of bytes in {paths[0]}, got {tuple(tensor.shape)}")
        return tensor

    parts = []
    for part in ("train", "t10k"):
        images, labels = read(f"{part}-images-idx3-ubyte", 3), read(f"{part}-labels-idx1-ubyte", 1)
        if not len(images) or len(images) != len(labels):
            raise DataError(f"data: expected as many {part} images as labels, got {len(images)} and {len(labels)}")
        parts.append((images[:, None], labels))
    classes = int(max(labels.max() for _, labels in parts)) + 1
    return _in_memory(parts[0], parts[1], [str(label) for label in range(classes)])


def _split_folders(folder: Path, strict: bool) -> Source:
    found = [folder / name for name in VALIDATION_NAMES if (folder / name).is_dir()]
    if not found:
        raise DataError(f"data: expected a folder val beside {folder / 'train'} ({', '.join(VALIDATION_NAMES)})")
    train, skipped_train = _image_folder(folder / "train", strict)
    val, skipped_val = _image_folder(found[0], strict)
    missing = sorted(set(train.classes) - set(val.classes))
    unknown = sorted(set(val.classes) - set(train.classes))
    if missing or unknown:
        raise DataError(
            f"data: expected the same class folders in {folder / 'train'} and {found[0]}; "
            f"missing from {found[0].name}: {', '.join(missing) or 'none'}, "
            f"only in {found[0].name}: {', '.join(unknown) or 'none'}"
        )
    return _folder_source(train, val, train.classes, skipped_train + skipped_val)


def _one_folder(folder: Path, strict: bool) -> Source:
    images, skipped = _image_folder(folder, strict)
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(images.targets):
        by_class.setdefault(label, []).append(index)
    lonely = [images.classes[label] for label, indices in by_class.items() if len(indices) < 2]
    if lonely:
        raise DataError(f"data: expected two images or more a class, to train and to validate; one in {lonely}")
    # Every fifth image of a class, and at least one; files are in order of name, so the split is always the same.
    val = sorted(index for indices in by_class.values() for index in indices[1::5])
    train = sorted(set(range(len(images))) - set(val))
    return _folder_source(Subset(images, train), Subset(images, val), images.classes, skipped)


def _folder_source(train: Dataset, val: Dataset, classes: list[str], skipped: int) -> Source:
    return Source(
        train=lambda fit, vary: FolderImages(train, fit, vary),
        val=lambda fit, vary: FolderImages(val, fit, vary),
        classes=classes,
        channels=3,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        skipped=skipped,
    )


def _image_folder(folder: Path, strict: bool) -> tuple[ImageFolder, int]:
    """The readable images below ``folder``, one folder a class, and how many were not readable."""
    if not any(path.is_dir() for path in folder.iterdir()):
        raise DataError(f"data: expected one folder of images a class in {folder}, found no folders")
    images = ImageFolder(str(folder), allow_empty=True)
    if not images.samples:
        raise DataError(f"data: no images below {folder} (looked for {', '.join(IMG_EXTENSIONS)})")
    with ThreadPoolExecutor() as pool:
        checks = pool.map(_why_unreadable, [path for path, _ in images.samples])
        reasons = list(track(checks, f"Checking images in {folder.name}", len(images.samples), transient=True))
    bad = [(path, reason) for (path, _), reason in zip(images.samples, reasons, strict=True) if reason]
    if bad and strict:
        listed = "; ".join(f"{path} ({reason})" for path, reason in bad[:10])
        raise DataError(f"data: {len(bad)} of {len(reasons)} images can't be read: {listed}")
    for path, reason in bad:
        warnings.warn(f"skipped an image that can't be read: {path} ({reason})", stacklevel=2)
    images.samples = images.imgs = [s for s, reason in zip(images.samples, reasons, strict=True) if not reason]
    images.targets = [label for _, label in images.samples]
    empty = sorted(set(range(len(images.classes))) - set(images.targets))
    if empty:
        raise DataError(f"data: no readable images in {', '.join(str(folder / images.classes[i]) for i in empty)}")
    return images, len(bad)


def _why_unreadable(path: str) -> str | None:
    try:
        default_loader(path)
    except Exception as error:  # whatever a broken file makes the decoder raise
        return f"{type(error).__name__}: {error}"
    return None
