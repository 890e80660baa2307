"""WebDataset shards: tar files of images and labels, which are never unpacked.

They contain ``KEY.jpg`` (or another image) and ``KEY.cls``, the label as a number; as in WebDataset, a key ends at the
first dot of the file name, and the files of a sample are adjacent. One pass over the headers locates the images; after
that they are read in any order, like files in folders.
"""

from __future__ import annotations

import stat
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track
from torchvision.datasets.folder import IMG_EXTENSIONS

from .errors import DataError
from .images import UnreadableImage, read_image
from .walk import VALIDATION_NAMES, skipped

IMAGE_KEYS = tuple(extension.lstrip(".") for extension in IMG_EXTENSIONS)
LABEL_KEY = "cls"
MOST_CLASSES = 100_000
"""Limit without names: a label beyond it is a mistake, such as a date or a key."""


class Sample(NamedTuple):
    """Location of an image in its shard: ``size`` bytes from ``offset``."""

    name: str
    offset: int
    size: int
    label: int


@dataclass(frozen=True)
class ShardImages:
    """Labelled images in shards, in order.

    Attributes:
        shards: tar files.
        names: keys of the images.
        places: (N, 4) numbers: index of the shard, offset in it, size, class.
        skipped: files in shards, and shards or ends of shards, that are not read.
    """

    shards: tuple[str, ...]
    names: list[str]
    places: np.ndarray
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Any:
        """The image in RGB, upright."""
        shard, offset, size, _ = self.places[index].tolist()
        try:
            with Path(self.shards[shard]).open("rb") as stream:
                stream.seek(offset)
                content = stream.read(size)
        except OSError as error:
            raise UnreadableImage(self.name(index), f"{error.strerror}") from error
        return read_image(content, self.name(index))

    def label(self, index: int) -> int:
        """Its class."""
        return int(self.places[index, 3])

    def name(self, index: int) -> str:
        """Its shard and key."""
        return f"{self.shards[self.places[index, 0]]}/{self.names[index]}"


def find_samples(shard: Path, left_out: list[str]) -> Iterator[Sample]:
    """The labelled images of a shard, up to the point where it is damaged.

    Args:
        shard: tar file.
        left_out: collects the names of images that belong to no sample, and finally why the shard is damaged, if it is.
    """
    try:
        if not stat.S_ISREG(shard.stat().st_mode):  # opening a named pipe would block
            raise tarfile.ReadError("it is not a regular file")
        with shard.open("rb") as stream:
            if stream.read(2) == b"\x1f\x8b":
                raise tarfile.ReadError("it is compressed; gunzip unpacks it")
            stream.seek(0)
            yield from _find_samples(stream, left_out)
    except (tarfile.TarError, OSError, EOFError) as error:
        left_out.append(f"the rest of it: {error}")


def _find_samples(stream: Any, left_out: list[str]) -> Iterator[Sample]:
    end, key, repeated = 0, "", False
    keys: set[str] = set()
    found: dict[str, Any] = {}  # the sample's member for each extension, and the label's content
    others: list[str] = []
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            end = member.offset_data + -(-member.size // 512) * 512
            path, slash, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            extension = extension.lower()
            if member.isdir() or any(map(skipped, member.name.removeprefix("./").split("/"))):
                continue
            if key != path + slash + stem:
                yield from _whole(key, found, others, left_out)
                key, found, others = path + slash + stem, {}, []
                repeated = key in keys
                keys.add(key)
            plain = member.isfile() and not member.issparse() and not repeated and extension not in found
            if plain and extension == LABEL_KEY:
                label = tar.extractfile(member)
                found[extension] = label.read(32) if label else b""
            elif plain and extension in IMAGE_KEYS:
                found[extension] = member
            elif name.lower().endswith(IMG_EXTENSIONS):
                others.append(member.name)
    stream.seek(end)
    rest = stream.read(2**16)
    if len(rest) < 512 or any(rest[:512]):
        raise tarfile.ReadError("it ends without the mark of an end")
    if any(rest):
        raise tarfile.ReadError("more follows its end")
    yield from _whole(key, found, others, left_out)


def _whole(key: str, found: dict[str, Any], others: list[str], left_out: list[str]) -> Iterator[Sample]:
    """The sample made of the files ``found``, if they are an image and its label; ``others`` are further images."""
    image = next((found[extension] for extension in found if extension != LABEL_KEY), None)
    if image is None:
        left_out += others or [f"{key}.{extension}" for extension in found]
        return
    # KEY.seg.png and the like belong to the sample; a second KEY.png doesn't.
    left_out += [other for other in others if other.rpartition("/")[2].partition(".")[2].lower() in IMAGE_KEYS]
    try:
        label = int(found[LABEL_KEY])
    except (KeyError, ValueError):
        label = -1
    if 0 <= label < 2**63:
        yield Sample(key, image.offset_data, image.size, label)
    else:
        left_out.append(f"{image.name} (no label from 0 up)")


def is_sharded(folder: Path) -> bool:
    """Whether the folder holds ``train/*.tar``, or ``train*.tar`` and no folders of images in ``train``."""
    if any(folder.glob("train/*.tar")):
        return True
    unpacked = (folder / "train").is_dir() and any(path.is_dir() for path in (folder / "train").iterdir())
    return not unpacked and any(folder.glob("train*.tar"))


def open_shards(folder: Path, strict: bool = False) -> tuple[ShardImages, ShardImages, list[str]]:
    """Training and validation shards of a folder, and the classes.

    ``train*.tar`` and ``val*.tar``, or folders ``train`` and ``val`` of tar files. The class names are the lines of
    ``classes.txt``, if there is one.

    Raises:
        DataError: there are no validation shards, none contains images, labels exceed the classes, or, in strict mode,
            something in a shard can't be read.
    """
    parts = []
    for names in (("train",), VALIDATION_NAMES):
        shards = next((found for name in names if (found := _shards(folder, name))), None)
        if shards is None:
            raise DataError(f"data: expected validation shards ({', '.join(f'{n}*.tar' for n in names)}) in {folder}")
        images = _indexed(shards, strict)
        if not len(images):
            raise DataError(
                f"data: expected labelled images ({', '.join(IMAGE_KEYS)}; {LABEL_KEY}) in {shards[0].parent}, "
                "found none"
            )
        parts.append(images)
    highest = max(int(part.places[:, 3].max()) for part in parts)
    file = folder / "classes.txt"
    if highest >= MOST_CLASSES and not file.is_file():
        raise DataError(f"data: expected labels below {MOST_CLASSES:,} in {folder}, found {highest}")
    classes = file.read_text().split("\n") if file.is_file() else [str(label) for label in range(highest + 1)]
    classes = [name.strip() for name in classes if name.strip()]
    if highest >= len(classes):
        raise DataError(f"data: expected labels below {len(classes)}, the lines of {file}; found {highest}")
    return parts[0], parts[1], classes


def _shards(folder: Path, part: str) -> list[Path]:
    """The part's shards, sorted by name."""
    found = sorted((folder / part).glob("*.tar")) or sorted(folder.glob(f"{part}*.tar"))
    return [path for path in found if not skipped(path.name)]


def _indexed(shards: list[Path], strict: bool) -> ShardImages:
    names: list[str] = []
    places = [np.empty((0, 4), np.int64)]
    bad = 0
    for number, shard in enumerate(track(shards, f"Finding images in {shards[0].parent.name}", transient=True)):
        left_out: list[str] = []
        found = list(find_samples(shard, left_out))
        names += [sample.name for sample in found]
        places += [np.array([(number, *sample[1:]) for sample in found], np.int64).reshape(-1, 4)]
        if left_out:
            listed = ", ".join(left_out[:5]) + (" and others" if len(left_out) > 5 else "")
            message = f"{len(left_out)} left out of {shard}, which has {len(found)} images: {listed}"
            if strict:
                raise DataError(f"data: {message}")
            warnings.warn(message, stacklevel=2)
            bad += len(left_out)
    return ShardImages(tuple(map(str, shards)), names, np.concatenate(places), bad)
