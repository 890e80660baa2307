"""The network and the images: as given, or defaults available on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..train.errors import DataError
from ..train.evaluate import trained
from ..train.images import read_image
from ..train.sources import open_source
from ..train.transforms import fit_transform, normalise
from ..train.walk import IMG_EXTENSIONS, walk
from ..viz.looking import Layer
from ..viz.page import about_stems
from ..viz.payload import image_payload

DEMO = Path("runs/demo/sasa_resnet14/model.safetensors")
SHIPPED = Path("fashion_mnist")  # packaged weights, with matching packaged images
MOST_IMAGES = 24


@dataclass
class Shown:
    """A displayed image, as bytes at the network's size."""

    key: str
    name: str
    bytes: Tensor
    label: str = ""


@dataclass
class Network:
    """A network, and how its images are prepared.

    Attributes:
        model: in evaluation mode.
        facts: of its weights file: see :func:`sasa.train.load_model`.
        note: introductory sentence about it.
        fit: resizes an image to the network's size, as bytes.
    """

    model: nn.Module
    facts: dict[str, Any]
    note: str = ""
    fit: Callable[[Any], Tensor] = field(init=False)
    _normalise: Callable[[Tensor], Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.fit = fit_transform(self.facts["image_size"], self.facts["crop_pct"])
        self._normalise = normalise(tuple(self.facts["mean"]), tuple(self.facts["std"]))

    def read(self, file: bytes | Path, name: str) -> Shown:
        """An image from a file or from memory.

        Raises:
            UnreadableImage: it is not an image.
        """
        image = read_image(file, name)
        fitted = self.fit(image.convert("L") if self.facts["in_chans"] == 1 else image)
        return Shown(hashlib.sha256(fitted.numpy().tobytes()).hexdigest()[:16], name, fitted)

    def input(self, shown: Shown) -> Tensor:
        """The image as the network expects it, (C, H, W)."""
        return self._normalise(shown.bytes[None])[0]

    def payload(self, shown: Shown, with_effects: bool) -> dict[str, Any]:
        """What the page shows of an image."""
        options = {"name": shown.name, "label": shown.label, "classes": self.facts["classes"]}
        payload = image_payload(self.model, self.input(shown), shown.bytes, **options, with_effects=with_effects)
        return payload | {"key": shown.key}


def find_network(weights: Path | None) -> Network:
    """The network in a file; by default, that of ``make demo``, or the packaged one for Fashion-MNIST.

    Raises:
        DataError: there is no network in the file, or no attention layer in the network.
    """
    model, facts = trained(weights or (DEMO if DEMO.is_file() else SHIPPED))
    if not any(isinstance(module, Layer) for module in model.modules()):
        raise DataError(f"weights: expected a network with attention layers, {facts['model']} has none")
    return Network(model, facts, about_stems(model))


def find_images(network: Network, paths: Sequence[Path]) -> tuple[list[Shown], list[str]]:
    """The images in files and folders, up to 24 of them; by default, some of the packaged ones.

    Returns:
        The images, and a sentence about each that was skipped.

    Raises:
        DataError: no image can be read, or a path doesn't exist.
    """
    if not paths:
        return list(_packaged(network)), []
    shown, problems = [], []
    for path in _files(paths):
        if len(shown) == MOST_IMAGES:
            problems.append(f"only the first {MOST_IMAGES} images are shown")
            break
        try:
            shown.append(network.read(path, path.name))
        except DataError as error:
            problems.append(str(error))
    if not shown:
        raise DataError(problems[0] if problems else f"images: expected images ({', '.join(IMG_EXTENSIONS)}), got none")
    return shown, problems


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from (path / name for name in walk(path))
        elif path.exists():
            yield path
        else:
            raise DataError(f"images: expected a file or folder, {path} is not there")


def _packaged(network: Network) -> Iterator[Shown]:
    """The first validation image of each class."""
    source = open_source(None)
    val: Any = source.val
    labels = [val.label(i) for i in range(len(val))]
    for label, name in enumerate(source.classes):
        i = labels.index(label)
        fitted = network.fit(val.read(i).expand(network.facts["in_chans"], -1, -1))
        yield Shown(f"packaged-{i}", val.name(i), fitted, name if name in network.facts["classes"] else "")
