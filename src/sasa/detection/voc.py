"""Pascal VOC's annotations in COCO's format.

``Annotations/NAME.xml`` and ``JPEGImages``, with the names of each part in ``ImageSets/Main/PART.txt``. Corners are
pixels counted from 1, both inside the box: ``xmin, xmax`` become ``x = xmin - 1, width = xmax - xmin + 1``. A box whose
corners share a column or row is an annotation error: it gets width or height 0, and is dropped together with other
invalid boxes (:mod:`sasa.detection.coco`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from torchvision.datasets import VOCDetection

from .._files import write_whole
from ..train.errors import DataError
from . import problems
from .problems import Problems


def voc_to_coco(
    folder: Path, part: str, categories: Sequence[str] | None = None, out: Path | None = None
) -> tuple[dict[str, Any], Problems]:
    """The annotations of one part in COCO's format, unchecked, and what could not be read.

    Args:
        folder: holds ``Annotations``, ``JPEGImages`` and ``ImageSets/Main``.
        part: train, val or another list in ``ImageSets/Main``.
        categories: names, in order of their ids, from 1; default: all that occur, in alphabetical order.
        out: JSON file to write them to.

    Raises:
        DataError: there is no such list, or a name occurs twice in it.
    """
    listed = folder / "ImageSets" / "Main" / f"{part}.txt"
    try:
        names = [line.split()[0] for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"data: {listed} can't be read: {error}") from error
    noted = Problems(f"{folder} ({part})")
    parsed = []
    for name in names:
        path = folder / "Annotations" / f"{name}.xml"
        try:
            parsed.append(_parsed(path, name))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ElementTree.ParseError) as error:
            noted.add(problems.NO_ANNOTATION, f"{path}: {error}")
    if categories is None:
        categories = sorted({kind for _, found in parsed for kind, _ in found})
    numbers = {name: number for number, name in enumerate(categories, 1)}
    images, annotations = [], []
    for number, (image, found) in enumerate(parsed, 1):
        images.append({"id": number} | image)
        for kind, box in found:
            entry = {"id": len(annotations) + 1, "image_id": number, "bbox": box, "iscrowd": 0}
            # The checks count a name that is not among the categories: 0 is not a category id.
            annotations.append(entry | {"category_id": numbers.get(kind, 0), "category_name": kind})
    found = {"images": images, "annotations": annotations}
    found["categories"] = [{"id": number, "name": name} for name, number in numbers.items()]
    if out is not None:
        write_whole(out, (json.dumps(found) + "\n").encode())
    return found, noted


def _parsed(path: Path, name: str) -> tuple[dict[str, Any], list[tuple[str, list[float]]]]:
    """The image of an annotation file, and names and boxes of its objects."""
    content = path.read_bytes()
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:  # could expand to exhaust memory; VOC has none
        raise ValueError("expected no document type or entities")
    root = ElementTree.fromstring(content)  # noqa: S314
    found = VOCDetection.parse_voc_xml(root)["annotation"]
    width, height = (_pixels(found["size"][side]) for side in ("width", "height"))
    file = found.get("filename") or f"{name}.jpg"
    if not isinstance(file, str):
        raise ValueError("expected one filename")
    boxes = []
    for one in found["object"]:
        box = one["bndbox"]
        left, top, right, bottom = (float(box[side]) for side in ("xmin", "ymin", "xmax", "ymax"))
        extent = [end - begin + (1.0 if end > begin else 0.0) for begin, end in ((left, right), (top, bottom))]
        boxes.append((str(one["name"]), [left - 1, top - 1, *extent]))
    return {"file_name": file, "width": width, "height": height}, boxes


def _pixels(text: str) -> int:
    value = float(text)
    if not (math.isfinite(value) and value == int(value) and value > 0):
        raise ValueError(f"size: expected pixels, got {text}")
    return int(value)
