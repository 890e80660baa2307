"""The folder of a run: whether it can be used, whether its run is finished, and where to resume it from."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .._files import write_whole
from .checkpoints import FOLDER, newest_whole, step_of
from .errors import DataError, OptionError, OutputError
from .recipe import FREE_TO_CHANGE, Recipe

WEIGHTS, RESULT, RECIPE, DATA = "model.safetensors", "result.json", "recipe.json", "data.json"
CHECKSUM = f"{WEIGHTS}.sha256"

# In order of removal: first what marks a run as finished, last what makes it resumable.
FILES = (RESULT, CHECKSUM, WEIGHTS, "metrics.csv", "curves.png", DATA, RECIPE)


@dataclass(frozen=True)
class Result:
    """The result of a training run.

    Attributes:
        model: name of the network.
        top1: share of validation images classified correctly after the last epoch, from 0 to 1.
        parameters: of the network.
        flops: of one image's forward; a multiply-add is 2.
        seconds_per_epoch: of training, validation not included.
        epochs: passes over the training images.
        train_images: images trained on.
        val_images: images validated on.
        skipped_images: unreadable images left out.
        top5: share whose class is among the first five guesses.
        val_loss: cross-entropy on the validation images.
    """

    model: str
    top1: float
    parameters: int
    flops: int
    seconds_per_epoch: float
    epochs: int
    train_images: int
    val_images: int
    skipped_images: int
    top5: float = math.nan
    val_loss: float = math.nan

    def __str__(self) -> str:
        return f"{self.model}: top-1 {self.top1:.1%} on {self.val_images} validation images"


def check_folder(out: Path, overwrite: bool, resume: bool = False) -> None:
    """Check, without changing anything, that the output folder can be created or written, and used.

    Raises:
        OutputError: it can't, or it isn't empty and neither ``overwrite`` nor ``resume`` is on.
    """
    try:
        existing = next(path for path in (out, *out.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"{existing} is not writable")
        held = [path.name for path in out.iterdir() if not path.name.startswith(".")] if existing == out else []
        odd = [name for name in FILES if (out / name).is_dir()]
    except OSError as error:
        raise OutputError(f"out: can't write to {out}: {error.strerror}") from error
    if odd:
        raise OutputError(f"out: expected a file at {out / odd[0]}, got a folder; remove it, or choose another folder")
    if held and not (resume or overwrite):
        raise OutputError(
            f"out: {out} is not empty; choose another folder, or pass --resume auto to resume the run in it, "
            "or --overwrite to replace it"
        )


def prepare_folder(out: Path, overwrite: bool, resume: bool = False) -> None:
    """Create the output folder, and check early that it can be written.

    Raises:
        OutputError: as :func:`check_folder`.
    """
    check_folder(out, overwrite, resume)
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"out: can't write to {out}: {error.strerror}") from error


def remove_run(out: Path) -> None:
    """Remove a run's files, in an order that never leaves what could be mistaken for another run."""
    (out / RESULT).unlink(missing_ok=True)
    for folder in (FOLDER, "tensorboard"):
        shutil.rmtree(out / folder, ignore_errors=True)
    for name in FILES:
        (out / name).unlink(missing_ok=True)


def finished_run(out: Path, tell: Callable[[str], None], kind: Any = Result) -> Any:
    """The result, of that kind, of the run in a folder, if it exists and the weights are those it was written with.

    ``tell`` is called with the reason if there is a result that can't be used.
    """
    if not (out / RESULT).is_file():
        return None
    try:
        result = kind(**json.loads((out / RESULT).read_bytes()))
        if any(isinstance(getattr(result, field.name), str) != (field.type == "str") for field in fields(kind)):
            raise ValueError("a value of a wrong type")
        expected = (out / CHECKSUM).read_text().split()[0]
        with (out / WEIGHTS).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise ValueError(f"{WEIGHTS} has another checksum than {CHECKSUM}")
    except (OSError, TypeError, ValueError, IndexError, RecursionError) as error:
        tell(f"{out} holds a finished run that can't be used ({error}): it is resumed")
        return None
    return result


def checkpoint_to_resume(out: Path, recipe: Recipe, data: dict[str, Any], tell: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from, of a run of the same recipe and classes; None if there is none.

    Raises:
        OptionError: an option that affects the result differs; the message names it and both values.
        DataError: the classes or their order differ, so that what the network learned would get other names.
        OutputError: it isn't known which options the run was started with.
    """
    checkpoint = newest_whole(out, tell)
    if checkpoint is None:
        if (out / RECIPE).exists():
            tell(f"no checkpoint that can be used in {out}: the run starts over")
        return None
    check_same_recipe(out, recipe)
    before = _read_json(out / DATA)
    if before != data:
        raise DataError(
            f"data: expected the classes and channels that the run in {out} was started with, {_shortened(before)}, "
            f"got {_shortened(data)}"
        )
    tell(f"resuming after step {step_of(checkpoint)}, from {checkpoint}")
    return checkpoint


def check_same_recipe(out: Path, recipe: Recipe) -> None:
    """Check that the run in a folder was started with the same options.

    Raises:
        OptionError: an option that affects the result differs; the message names it and both values.
        OutputError: it isn't known which options the run was started with.
    """
    # An option that the run's version of this package didn't have counts as having its current default.
    before = json.loads(json.dumps(Recipe().as_dict())) | _read_json(out / RECIPE)
    now = json.loads(json.dumps(recipe.as_dict()))
    changed = [name for name in now if name not in FREE_TO_CHANGE and before.get(name) != now[name]]
    if changed:
        listed = "; ".join(f"{name}: {before.get(name)!r} then, {now[name]!r} now" for name in changed)
        raise OptionError(f"resume: expected the options that the run in {out} was started with; {listed}")


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"expected names with values, got {_shortened(found)}")
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(
            f"out: {path}, what the run was started with, can't be read: {error}; --overwrite starts it over"
        ) from error
    return found


def write_json(path: Path, value: Any) -> None:
    """Write a value atomically."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())
