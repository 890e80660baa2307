"""WebDataset shards: tar files of images and labels, read from end to end and never unpacked."""

from __future__ import annotations

import json
import random
import tarfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from torchvision.datasets.folder import IMG_EXTENSIONS

from .._extras import require
from .errors import DataError

IMAGE_KEYS = tuple(extension.lstrip(".") for extension in IMG_EXTENSIONS)
LABEL_KEY = "cls"
MOST_CLASSES = 100_000
"""Without names: a label beyond is a mistake, as a date or a key."""

SHUFFLED = 1000
"""Samples held back to be drawn from at random, within shards that are themselves in random order."""


@dataclass(frozen=True)
class ShardImages:
    """Labelled images in shards, in order.

    Attributes:
        shards: tar files.
        counts: images in each.
        skipped: shards, or ends of shards, that could not be read.
    """

    shards: tuple[str, ...]
    counts: tuple[int, ...]
    skipped: int = 0

    def __len__(self) -> int:
        return sum(self.counts)

    def consumers(self, number: int, of: int) -> tuple[list[int], int, int]:
        """What one of several readers takes: shards, and of their samples those at ``first::step``.

        Whole shards, where there are enough of them to share out; else every reader goes through all.
        """
        if len(self.shards) >= of:
            return list(range(number, len(self.shards), of)), 0, 1
        return list(range(len(self.shards))), number, of

    def count(self, number: int, of: int) -> int:
        """How many images that reader takes."""
        shards, first, step = self.consumers(number, of)
        return len(range(first, sum(self.counts[shard] for shard in shards), step))

    def samples(self, number: int, of: int, seed: tuple[int, ...] | None = None) -> Iterator[Sample]:
        """That reader's samples in order; with a seed, in the random order that follows from it."""
        shards, first, step = self.consumers(number, of)
        if seed is not None:
            # All readers shuffle the shards alike before they share them out, so none is read twice.
            order = np.random.default_rng(seed).permutation(len(self.shards))
            shards = [int(order[shard]) for shard in shards]
        wds = require("webdataset", "data")
        options = {"handler": wds.handlers.ignore_and_continue}  # broken shards were told when opened
        files = wds.tariterators.tar_file_expander(_opened(self.shards[shard] for shard in shards), **options)
        stream = wds.tariterators.group_by_keys(files, **options)
        whole = (sample for sample in map(_sample, stream) if sample.image is not None)
        samples = (sample for place, sample in enumerate(whole) if place % step == first)
        if seed is not None:
            samples = wds.shuffle(SHUFFLED, initial=SHUFFLED, rng=random.Random(repr((seed, number))))(samples)  # noqa: S311
        return samples


@dataclass(frozen=True)
class Sample:
    """One image of a shard, not yet decoded; ``label`` is None if it has none that can be read."""

    name: str
    image: bytes | None
    label: int | None


def is_sharded(folder: Path) -> bool:
    """Whether the folder holds ``train/*.tar``, or ``train*.tar`` and no folders of images in ``train``."""
    if any(folder.glob("train/*.tar")):
        return True
    unpacked = (folder / "train").is_dir() and any(path.is_dir() for path in (folder / "train").iterdir())
    return not unpacked and any(folder.glob("train*.tar"))


def open_shards(folder: Path, strict: bool = False) -> tuple[ShardImages, ShardImages, list[str]]:
    """Training and validation shards of a folder, and the classes.

    ``train*.tar`` and ``val*.tar``, or folders ``train`` and ``val`` of tar files. In them ``KEY.jpg`` (or another
    image) and ``KEY.cls``, the label as a number. Names of classes are the lines of ``classes.txt``, if there is one.
    The samples of a shard are counted, unless the folder has the index that ``widsindex create`` writes.

    Raises:
        DataError: no validation shards, none with images, labels beyond the classes, or in strict mode a broken shard.
    """
    require("webdataset", "data")
    parts, highest = [], -1
    for names in (("train",), ("val", "valid", "validation", "test")):
        shards = next((found for name in names if (found := _shards(folder, name))), None)
        if shards is None:
            raise DataError(f"data: expected validation shards ({', '.join(f'{n}*.tar' for n in names)}) in {folder}")
        images, label = _counted(folder, shards, strict)
        if not len(images):
            raise DataError(f"data: expected images ({', '.join(IMAGE_KEYS)}) in {shards[0].parent}, found none")
        parts.append(images)
        highest = max(highest, label)
    file = folder / "classes.txt"
    if highest >= MOST_CLASSES and not file.is_file():
        raise DataError(f"data: expected labels below {MOST_CLASSES:,} in {folder}, found {highest}")
    classes = file.read_text().split("\n") if file.is_file() else [str(label) for label in range(highest + 1)]
    classes = [name.strip() for name in classes if name.strip()]
    if not classes:
        raise DataError(f"data: expected labels ({LABEL_KEY}) in the shards of {folder}, found none")
    if highest >= len(classes):
        raise DataError(f"data: expected labels below {len(classes)}, the lines of {file}; found {highest}")
    return parts[0], parts[1], classes


def _shards(folder: Path, part: str) -> list[Path]:
    """The part's shards in order of name."""
    return sorted((folder / part).glob("*.tar")) or sorted(folder.glob(f"{part}*.tar"))


def _counted(folder: Path, shards: list[Path], strict: bool) -> tuple[ShardImages, int]:
    """The shards with their numbers of images, and the highest label that was seen."""
    known = _index(folder) if (folder / "classes.txt").is_file() else {}
    counts, highest, broken = [], -1, 0
    for shard in track(shards, f"Counting images in {shards[0].parent.name}", transient=True):
        if shard.name in known:
            counts.append(known[shard.name])
            continue
        count, label, reason = _scan(shard)
        if reason:
            if strict:
                raise DataError(f"data: expected a whole shard, got {shard} ({reason})")
            warnings.warn(f"read only the first {count} images of a broken shard: {shard} ({reason})", stacklevel=2)
            broken += 1
        counts.append(count)
        highest = max(highest, label)
    return ShardImages(tuple(map(str, shards)), tuple(counts), broken), highest


def _index(folder: Path) -> dict[str, int]:
    """Images in each shard by its file name, from the folder's ``index.json``, if it has one."""
    file = folder / "index.json"
    if not file.is_file():
        return {}
    try:
        shards = json.loads(file.read_text())["shardlist"]
        return {Path(shard["url"]).name: int(shard["nsamples"]) for shard in shards}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"data: expected the index that widsindex writes, got {file} ({error!r})") from error


def _scan(shard: Path) -> tuple[int, int, str]:
    """Images in a shard, its highest label, and what is wrong with it if anything: headers are read, images not."""
    base_plus_ext = require("webdataset.tariterators", "data").base_plus_ext
    keys, highest = set(), -1
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                key, extension = base_plus_ext(member.name)
                # The last member of a shard that was cut off has a whole header and half of its bytes.
                if not member.isfile() or member.offset_data + member.size > shard.stat().st_size:
                    continue
                if extension and extension.lower() in IMAGE_KEYS:
                    keys.add(key)
                elif extension == LABEL_KEY and (file := tar.extractfile(member)):
                    highest = max(highest, _label(file.read()) or 0)
    except (tarfile.TarError, OSError, EOFError) as error:
        return len(keys), highest, f"{type(error).__name__}: {error}"
    return len(keys), highest, ""


def _opened(paths: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The shards one after another, each closed when the next is asked for: the library leaves that to chance."""
    for path in paths:
        with Path(path).open("rb") as stream:
            yield {"url": path, "stream": stream}


def _label(text: bytes | None) -> int | None:
    try:
        return int(text) if text is not None else None
    except ValueError:
        return None


def _sample(found: dict) -> Sample:
    """A sample as the library groups it: files by their extension."""
    image = next((found[key] for key in found if key.lower() in IMAGE_KEYS), None)
    return Sample(f"{found['__url__']}/{found['__key__']}", image, _label(found.get(LABEL_KEY)))
