"""WebDataset shards: tar files of images and labels, read from end to end and never unpacked.

In them are ``KEY.jpg`` (or another image) and ``KEY.cls``, the label as a number; as in WebDataset, a key ends at the
first dot of the file's name, and the files of a sample follow each other. Counting and reading are one reader.
"""

from __future__ import annotations

import gzip
import json
import random
import stat
import tarfile
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import track
from torchvision.datasets.folder import IMG_EXTENSIONS

from .._extras import require
from .errors import DataError
from .walk import VALIDATION_NAMES, skipped

IMAGE_KEYS = tuple(extension.lstrip(".") for extension in IMG_EXTENSIONS)
LABEL_KEY = "cls"
MOST_CLASSES = 100_000
"""Without names: a label beyond is a mistake, as a date or a key."""

SHUFFLED = 1000
"""Samples held back to be drawn from at random, within shards that are themselves in random order."""


@dataclass(frozen=True)
class Sample:
    """One image of a shard, not yet decoded; ``label`` is None if it has none that can be read."""

    name: str
    image: bytes
    label: int | None


@dataclass(frozen=True)
class ShardImages:
    """Labelled images in shards, in order.

    Attributes:
        shards: tar files.
        counts: images in each.
        skipped: files in shards, and shards or ends of shards, that are not read.
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
        """That reader's samples in order; with a seed, in the random order that follows from it.

        Raises:
            DataError: a shard has not as many images as were counted, or as the index says.
        """
        shards, first, step = self.consumers(number, of)
        if seed is not None:
            # All readers shuffle the shards alike before they share them out, so none is read twice.
            order = np.random.default_rng(seed).permutation(len(self.shards))
            shards = [int(order[shard]) for shard in shards]
        samples = (s for place, s in enumerate(self._read(shards)) if place % step == first)
        if seed is not None:
            shuffle = require("webdataset", "data").shuffle
            samples = shuffle(SHUFFLED, initial=SHUFFLED, rng=random.Random(repr((seed, number))))(samples)  # noqa: S311
        return samples

    def _read(self, shards: list[int]) -> Iterator[Sample]:
        for shard in shards:
            count = 0
            for sample in read_shard(Path(self.shards[shard]), []):
                yield sample
                count += 1
            if count != self.counts[shard]:
                raise DataError(
                    f"data: expected {self.counts[shard]} images in {self.shards[shard]}, as counted at the start "
                    f"or in index.json, got {count}"
                )


def read_shard(shard: Path, left_out: list[str], images: bool = True) -> Iterator[Sample]:
    """The samples of a shard that have an image, up to where it is broken.

    Args:
        shard: tar file, gzip-compressed or not.
        left_out: is given the names of images that belong to no sample, and at last why the shard is broken, if it is.
        images: or only the labels are read.
    """
    try:
        if not stat.S_ISREG(shard.stat().st_mode):  # to open a named pipe would wait for ever
            raise tarfile.ReadError("it is not a regular file")
        with shard.open("rb") as stream:
            compressed = stream.read(2) == b"\x1f\x8b"
        with (
            gzip.open(shard) if compressed else shard.open("rb") as stream,
            tarfile.open(fileobj=stream, mode="r:") as tar,
        ):
            end, key, repeated = 0, None, False
            keys: set[tuple[str, str]] = set()
            sample: dict[str, bytes] = {}
            names: list[str] = []
            for member in tar:
                end = member.offset_data + -(-member.size // 512) * 512
                path, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                extension = extension.lower()
                if member.isdir() or any(map(skipped, member.name.removeprefix("./").split("/"))):
                    continue
                if key != (path, stem):
                    yield from _whole(shard, key, sample, names, left_out)
                    sample, names, key = {}, [], (path, stem)
                    repeated = key in keys
                    keys.add(key)
                wanted = extension == LABEL_KEY or extension in IMAGE_KEYS
                if wanted and member.isfile() and not repeated and extension not in sample:
                    data = tar.extractfile(member) if images or extension == LABEL_KEY else None
                    sample[extension] = data.read() if data else b""
                elif name.lower().endswith(IMG_EXTENSIONS):
                    names.append(member.name)
            stream.seek(end)
            rest = stream.read(2**16)
            if len(rest) < 512 or any(rest[:512]):
                raise tarfile.ReadError("it ends without the mark of an end")
            if any(rest):
                raise tarfile.ReadError("more follows its end")
            yield from _whole(shard, key, sample, names, left_out)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        left_out.append(f"the rest of it: {error}")


def _whole(
    shard: Path, key: tuple[str, str] | None, found: dict[str, bytes], names: list[str], left_out: list[str]
) -> Iterator[Sample]:
    """The sample that the files ``found`` make, if one of them is an image; ``names`` are other images."""
    image = next((found[extension] for extension in found if extension != LABEL_KEY), None)
    name = "/".join(filter(None, key or ()))
    if image is None:
        left_out += names or [f"{name}.{extension}" for extension in found]
        return
    # KEY.seg.png and the like belong to the sample; a second KEY.png doesn't.
    left_out += [other for other in names if other.rpartition("/")[2].partition(".")[2].lower() in IMAGE_KEYS]
    try:
        label = int(found[LABEL_KEY])
    except (KeyError, ValueError):
        label = None
    yield Sample(f"{shard}/{name}", image, label)


def is_sharded(folder: Path) -> bool:
    """Whether the folder holds ``train/*.tar``, or ``train*.tar`` and no folders of images in ``train``."""
    if any(folder.glob("train/*.tar")):
        return True
    unpacked = (folder / "train").is_dir() and any(path.is_dir() for path in (folder / "train").iterdir())
    return not unpacked and any(folder.glob("train*.tar"))


def open_shards(folder: Path, strict: bool = False) -> tuple[ShardImages, ShardImages, list[str]]:
    """Training and validation shards of a folder, and the classes.

    ``train*.tar`` and ``val*.tar``, or folders ``train`` and ``val`` of tar files. Names of classes are the lines of
    ``classes.txt``, if there is one. The samples of a shard are counted, unless the folder has the index that
    ``widsindex create`` writes.

    Raises:
        DataError: no validation shards, none with images, labels beyond the classes, or in strict mode anything in a
            shard that can't be read.
    """
    require("webdataset", "data")
    parts, highest = [], -1
    for names in (("train",), VALIDATION_NAMES):
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
    found = sorted((folder / part).glob("*.tar")) or sorted(folder.glob(f"{part}*.tar"))
    return [path for path in found if not skipped(path.name)]


def _counted(folder: Path, shards: list[Path], strict: bool) -> tuple[ShardImages, int]:
    """The shards with their numbers of images, and the highest label that was seen."""
    known = _index(folder) if (folder / "classes.txt").is_file() else {}
    counts, highest, bad = [], -1, 0
    for shard in track(shards, f"Counting images in {shards[0].parent.name}", transient=True):
        if shard.name in known:
            counts.append(known[shard.name])
            continue
        left_out: list[str] = []
        labels = [sample.label for sample in read_shard(shard, left_out, images=False)]
        counts.append(len(labels))
        highest = max([highest, *(label for label in labels if label is not None)])
        if left_out:
            listed = ", ".join(left_out[:5]) + (" and others" if len(left_out) > 5 else "")
            message = f"{len(left_out)} left out of {shard}, which has {len(labels)} images: {listed}"
            if strict:
                raise DataError(f"data: {message}")
            warnings.warn(message, stacklevel=2)
            bad += len(left_out)
    return ShardImages(tuple(map(str, shards)), tuple(counts), bad), highest


def _index(folder: Path) -> dict[str, int]:
    """Images in each shard by its file name, from the folder's ``index.json``, if it has one."""
    file = folder / "index.json"
    if not file.is_file():
        return {}
    try:
        counts = {Path(shard["url"]).name: shard["nsamples"] for shard in json.loads(file.read_text())["shardlist"]}
        if not all(type(count) is int and count >= 0 for count in counts.values()):
            raise ValueError("nsamples: expected ints of at least 0")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"data: expected the index that widsindex writes, got {file} ({error!r})") from error
    return counts
