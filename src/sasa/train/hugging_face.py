"""Labelled images from a ``datasets.DatasetDict`` written by ``save_to_disk``, read from that folder only.

Nothing is downloaded. ``datasets`` maps its files into memory, so an image takes no space until it is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import _extras
from .errors import DataError
from .images import UnreadableImage, read_image
from .walk import VALIDATION_NAMES

IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "fine_label", "target", "class")


class HubImages:
    """The images of one split. It can be pickled: the pickle contains the labels, but no images."""

    def __init__(self, rows: Any, column: str, split: str, labels: np.ndarray) -> None:
        self._rows, self._column, self._split, self._labels = rows, column, split, labels

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> Image.Image:
        """The image, as ``read_image`` decodes it, with the same error if there is none."""
        data, path, name = self._find(index)
        if data is None and not path:
            raise UnreadableImage(name, "there is no image")
        return read_image(Path(path) if data is None else data, name)

    def label(self, index: int) -> int:
        """The number of its class, without reading the image."""
        return int(self._labels[index])

    def name(self, index: int) -> str:
        """Its name in errors: its split and row, and its file if known."""
        return self._find(index)[2]

    def _find(self, index: int) -> tuple[bytes | None, str, str]:
        image = self._rows[index][self._column] or {"bytes": None, "path": None}
        path = image["path"] or ""
        return image["bytes"], path, f"{self._split}/{index}" + (f" ({path})" if path else "")


def is_hugging_face(folder: Path) -> bool:
    """Whether a ``DatasetDict`` was saved in this folder."""
    return (folder / "dataset_dict.json").is_file()


def open_hugging_face(folder: Path) -> tuple[HubImages, HubImages, list[str]]:
    """The images to train on, those to validate on, and the names of the classes.

    The column of images is that of type ``Image``; if there are several, the one called image or img. The column of
    labels is that of type ``ClassLabel``; if there are several, the first called label, labels, fine_label, target or
    class. ``DatasetDict.class_encode_column`` turns numbers or text into such a column.

    Args:
        folder: written by ``DatasetDict.save_to_disk``, with a split train, and one called val, valid, validation or
            test. The first of these that exists is used; other splits are not opened.

    Raises:
        DataError: a split or a column is missing, a label is missing or invalid, or a file is damaged.
        ImportError: ``datasets`` is not installed.
    """
    datasets = _extras.require("datasets", "data")
    try:
        names = [str(name) for name in json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"data: expected a list of splits in {folder / 'dataset_dict.json'}, got {error!r}") from error
    found = [name for name in VALIDATION_NAMES if name in names]
    if "train" not in names or not found:
        wish = " or ".join(VALIDATION_NAMES) if "train" in names else "train"
        raise DataError(f"data: expected a split {wish} in {folder}, got {', '.join(names) or 'none'}")
    train, val = (_open_split(datasets, folder / name) for name in ("train", found[0]))
    label = _column(train.features, datasets.ClassLabel, LABEL_NAMES, folder)
    classes = train.features[label].names
    if getattr(val.features.get(label), "names", None) != classes:
        raise DataError(f"data: expected the same classes in column {label} of train and {found[0]} in {folder}")
    images = []
    for name, rows in (("train", train), (found[0], val)):
        labels = _labels(rows.select_columns([label]).with_format("arrow")[:].column(0), classes, folder / name)
        column = _column(rows.features, datasets.Image, IMAGE_NAMES, folder)
        images.append(HubImages(rows.select_columns([column]), column, name, labels))
    return images[0], images[1], classes


def _open_split(datasets: Any, folder: Path) -> Any:
    """Its rows, with images left encoded; a read format set before saving is reset."""
    try:
        saved = any(folder.glob("*.arrow"))  # an empty split has none
        rows: Any = datasets.Dataset.load_from_disk(str(folder.resolve()), keep_in_memory=False) if saved else []
        if not len(rows):
            raise ValueError("no images")
        rows.data.validate(full=True)  # else a wrong offset crashes the process; image contents aren't checked
        for name, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
    except Exception as error:  # Arrow may raise anything for a damaged file
        raise DataError(f"data: expected {folder} as DatasetDict.save_to_disk writes it, got {error!r}") from error
    return rows.with_format(None)


def _column(features: Any, wanted: type, names: tuple[str, ...], folder: Path) -> str:
    """The column of this type; if there are several, the first with one of the names."""
    columns = [name for name, feature in features.items() if isinstance(feature, wanted)]
    named = [name for name in names if name in columns]
    if not named and len(columns) != 1:
        wish = f"a column of type {wanted.__name__}, of several one called {' or '.join(names)}"
        listed = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        raise DataError(f"data: expected {wish}, in {folder}, got {listed or 'no columns'}")
    return (named or columns)[0]


def _labels(column: Any, classes: list[str], folder: Path) -> np.ndarray:
    labels = column.fill_null(-1).to_numpy()
    bad = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(bad):
        got = f"{column[int(bad[0])]} for image {bad[0]} ({len(bad)} of {len(labels)} labels are no class)"
        raise DataError(f"data: expected one of {len(classes)} classes for every image in {folder}, got {got}")
    return labels
