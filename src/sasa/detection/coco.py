"""COCO instances, validated: every box is finite, inside its image and of a known category, or dropped and counted.

The format (https://cocodataset.org/#format-data): ``images`` with id, file_name, width and height; ``categories`` with
id and name; ``annotations`` with id, image_id, category_id and bbox ``[x, y, width, height]`` in pixels from the upper
left corner. ``area`` and ``iscrowd`` are used if given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..train.errors import DataError
from . import problems
from .problems import Problems


class Box(NamedTuple):
    """A box of an image.

    Attributes:
        corners: left, top, right, bottom in pixels; right and bottom are exclusive.
        label: the index of its category among the classes.
        area: in pixels, of the object if it was outlined, else of the box.
        crowd: whether it surrounds a crowd: such boxes are not trained on, and detecting them counts neither way.
    """

    corners: tuple[float, float, float, float]
    label: int
    area: float
    crowd: bool = False


@dataclass
class AnnotatedImage:
    """An image with its boxes.

    Attributes:
        number: its id.
        file: its path.
        width: in pixels.
        height: likewise.
        boxes: the boxes in it; there may be none.
    """

    number: int
    file: Path
    width: int
    height: int
    boxes: list[Box]


class Annotations(NamedTuple):
    """The contents of an instances file.

    Attributes:
        images: with their boxes, sorted by id.
        categories: names by id, sorted by id: the classes.
        problems: what was dropped or changed.
    """

    images: list[AnnotatedImage]
    categories: dict[int, str]
    problems: Problems


def read_coco(file: Path, folder: Path, categories: dict[int, str] | None = None, strict: bool = False) -> Annotations:
    """Read an instances file.

    Args:
        file: JSON in COCO's format.
        folder: of the images.
        categories: the expected ones, as in the training part; default: the file's own.
        strict: reject what is otherwise dropped with a warning.

    Raises:
        DataError: the file is not complete JSON of that structure, two images, annotations or categories share an id,
            no image is left, or, with ``strict``, anything else is wrong.
    """
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is cut short or damaged: {error}"
        raise DataError(f"data: {file} can't be read: {reason}") from error
    return check_coco(found, str(file), folder, categories, strict=strict)


def check_coco(
    found: Any,
    where: str,
    folder: Path,
    categories: dict[int, str] | None = None,
    *,
    found_problems: Problems | None = None,
    strict: bool = False,
) -> Annotations:
    """The same for a mapping of that structure, named ``where`` in messages."""
    noted = found_problems or Problems(where)
    listed = _listed(found, where)
    own = {entry["id"]: entry["name"] for entry in listed["categories"]}
    if len(set(own.values())) != len(own):
        raise DataError(f"data: {where}: expected different names of the categories, got {', '.join(own.values())}")
    own = dict(sorted(own.items()))
    categories = own if categories is None else categories
    labels = {number: place for place, number in enumerate(categories) if own.get(number) == categories[number]}
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in listed["images"]}
    boxes: dict[int, list[Box]] = {number: [] for number in sizes}
    for entry in listed["annotations"]:
        name = f"annotation {entry['id']}"
        if entry["image_id"] not in boxes:
            noted.add(problems.NO_IMAGE, f"{name}: image {entry['image_id']}")
            continue
        if entry["category_id"] not in labels:
            noted.add(problems.NO_CATEGORY, f"{name}: category {entry.get('category_name', entry['category_id'])}")
            continue
        box = _checked_box(entry, labels[entry["category_id"]], sizes[entry["image_id"]], name, noted)
        if box is not None:
            boxes[entry["image_id"]].append(box)
    images = []
    for entry in sorted(listed["images"], key=lambda entry: entry["id"]):
        path = _inside(folder, entry["file_name"], where)
        if not path.is_file():
            noted.add(problems.NO_FILE, f"{path}")
            continue
        if not boxes[entry["id"]]:
            noted.add(problems.NO_BOXES, entry["file_name"])
        images.append(AnnotatedImage(entry["id"], path, entry["width"], entry["height"], boxes[entry["id"]]))
    noted.report(strict)
    if not images:
        raise DataError(f"data: {where}: expected images in {folder}, found none of the {len(sizes)} listed")
    return Annotations(images, categories, noted)


def _checked_box(entry: dict[str, Any], label: int, size: tuple[int, int], name: str, noted: Problems) -> Box | None:
    """The box clipped to its image, or None with the reason recorded."""
    left, top, width, height = entry["bbox"]
    shown = f"{name}: bbox {entry['bbox']}"
    if not all(map(_finite, entry["bbox"])):
        noted.add(problems.NOT_FINITE, shown)
    elif width < 0 or height < 0:
        noted.add(problems.SWAPPED, shown)
    elif width == 0 or height == 0:
        noted.add(problems.EMPTY, shown)
    else:
        corners = (max(left, 0.0), max(top, 0.0), min(left + width, size[0]), min(top + height, size[1]))
        if corners[2] <= corners[0] or corners[3] <= corners[1]:
            noted.add(problems.OUTSIDE, f"{shown} in {size[0]} x {size[1]} pixels")
            return None
        if max(width - (corners[2] - corners[0]), height - (corners[3] - corners[1])) > ROUNDING:
            noted.add(problems.CLIPPED, f"{shown} in {size[0]} x {size[1]} pixels")
        area: Any = entry.get("area")
        if not _finite(area) or area <= 0:
            area = (corners[2] - corners[0]) * (corners[3] - corners[1])
        return Box(tuple(map(float, corners)), label, float(area), entry.get("iscrowd") == 1)  # type: ignore[arg-type]
    return None


ROUNDING = 1.0
"""Pixels by which a box may cross the edge without a warning: annotations are rounded in various ways."""


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e9


def _inside(folder: Path, name: str, where: str) -> Path:
    """The file of that name in the folder.

    Raises:
        DataError: it would be outside the folder.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise DataError(f"data: {where}: file_name: expected a path inside {folder}, got {name!r}")
    return folder / path


def _listed(found: Any, where: str) -> dict[str, list[dict[str, Any]]]:
    """The three lists of an instances file, with the fields that are needed, of the right types.

    Raises:
        DataError: something is missing or has the wrong type, or an id occurs twice.
    """
    if not isinstance(found, dict):
        raise DataError(f"data: {where}: expected a mapping of COCO's format, got {_short(found)}")
    for section, fields in SHAPE.items():
        entries = found.get(section)
        if not isinstance(entries, list):
            raise DataError(f"data: {where}: {section}: expected a list, got {_short(entries)}")
        for place, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise DataError(f"data: {where}: {section}[{place}]: expected a mapping, got {_short(entry)}")
            for name, (expected, right) in fields.items():
                if not right(entry.get(name)):
                    message = f"{section}[{place}].{name}: expected {expected}, got {_short(entry.get(name))}"
                    raise DataError(f"data: {where}: {message}")
        _different([entry["id"] for entry in entries], f"data: {where}: {section}: expected different ids")
    names = [entry["file_name"] for entry in found["images"]]
    _different(names, f"data: {where}: images: expected different file names")
    if not found["categories"]:
        raise DataError(f"data: {where}: categories: expected one or more, got none")
    return found


def _different(values: Iterable[Any], message: str) -> None:
    seen: set[Any] = set()
    twice = []
    for value in values:
        if value in seen:
            twice.append(value)
        seen.add(value)
    if twice:
        listed = ", ".join(map(str, twice[:5])) + (", …" if len(twice) > 5 else "")
        raise DataError(f"{message}, got {len(twice)} more than once: {listed}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _number(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**53


def _side(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _four(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(type(number) in (int, float) for number in value)


SHAPE: dict[str, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "images": {
        "id": ("a whole number", _number),
        "file_name": ("text", _text),
        "width": ("pixels", _side),
        "height": ("pixels", _side),
    },
    "categories": {"id": ("a whole number", _number), "name": ("text", _text)},
    "annotations": {
        "id": ("a whole number", _number),
        "image_id": ("a whole number", _number),
        "category_id": ("a whole number", _number),
        "bbox": ("four numbers", _four),
    },
}
"""Required fields of each entry: description and check."""
