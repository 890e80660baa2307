"""Folders of images for the plans: nested subsets of the training sets, each together with the whole test set.

The validation part of a folder is the data set's test split, which is not used to choose anything; learning rates are
chosen on ``NAME-tune``, whose validation part is taken from the other end of the shuffled training set.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

SIZES = {"fashion": (2_000, 5_000, 10_000, 20_000, 40_000, 60_000), "cifar": (2_000, 5_000, 10_000, 20_000)}
TUNED_ON = {"fashion": (5_000, 5_000), "cifar": (5_000, 2_500)}
"""Training and validation images of the folder for learning rates."""


def fashion_mnist(source: Path, out: Path) -> None:
    """Subsets of the four IDX files in ``source``, as IDX files."""
    parts = {part: (_idx(source, f"{part}-images-idx3", 16), _idx(source, f"{part}-labels-idx1", 8)) for part in PARTS}
    images, labels = parts["train"]
    images = images.reshape(len(labels), -1)
    order = np.random.default_rng(0).permutation(len(labels))
    test = parts["t10k"][0].reshape(len(parts["t10k"][1]), -1), parts["t10k"][1]
    splits = {f"fashion-{size}": (order[:size], test) for size in SIZES["fashion"]}
    train, val = TUNED_ON["fashion"]
    splits["fashion-tune"] = order[:train], (images[order[-val:]], labels[order[-val:]])
    for name, (chosen, held_out) in splits.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        for part, (x, y) in {"train": (images[chosen], labels[chosen]), "t10k": held_out}.items():
            _write_idx(folder / f"{part}-images-idx3-ubyte", x.reshape(-1, 28, 28))
            _write_idx(folder / f"{part}-labels-idx1-ubyte", y)


PARTS = ("train", "t10k")


def _idx(source: Path, name: str, header: int) -> np.ndarray:
    with gzip.open(source / f"{name}-ubyte.gz") as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def _write_idx(path: Path, values: np.ndarray) -> None:
    header = np.array([0x0800 + values.ndim, *values.shape], ">i4").tobytes()
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def cifar10(source: Path, out: Path) -> None:
    """Subsets of the folders ``train`` and ``val`` in ``source``, as folders of links; classes stay balanced."""
    files = {part: sorted(path.relative_to(source / part) for path in (source / part).glob("*/*")) for part in SPLITS}
    classes = sorted({path.parts[0] for path in files["train"]})
    rng = np.random.default_rng(0)
    train = {name: [path for path in files["train"] if path.parts[0] == name] for name in classes}
    order = {name: [train[name][i] for i in rng.permutation(len(train[name]))] for name in classes}

    def first(count: int) -> list[Path]:
        return [path for name in classes for path in order[name][: count // len(classes)]]

    for size in SIZES["cifar"]:
        _link(source, out / f"cifar-{size}", {"train": ("train", first(size)), "val": ("val", files["val"])})
    count, held_out = TUNED_ON["cifar"]
    last = [path for name in classes for path in order[name][-(held_out // len(classes)) :]]
    _link(source, out / "cifar-tune", {"train": ("train", first(count)), "val": ("train", last)})


SPLITS = ("train", "val")


def clothing(source: Path, out: Path) -> None:
    """``clothing-tune``: train and val of ``source``; ``clothing``: both of them for training, and its test part."""
    files = {
        part: sorted(path.relative_to(source / part) for path in (source / part).glob("*/*"))
        for part in ("train", "val", "test")
    }
    tuned_on = {part: (part, files[part]) for part in SPLITS}
    _link(source, out / "clothing-tune", tuned_on)
    _link(source, out / "clothing", {"train": ("train", files["train"]), "val": ("test", files["test"])})
    _link(source, out / "clothing", {"train": ("val", files["val"])})


def _link(source: Path, folder: Path, parts: dict[str, tuple[str, list[Path]]]) -> None:
    for part, (origin, paths) in parts.items():
        if not paths:
            raise SystemExit(f"no images: expected {source / origin}/CLASS/IMAGE")
        for path in paths:
            link = folder / part / path
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.symlink_to((source / origin / path).resolve())
