"""Checkpoints that are whole or not there: written beside, checksummed, renamed; and the newest whole one found."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from .errors import OutputError

KEPT = 3
"""Checkpoints of a run that are kept: the last ones."""

PATIENCE = 20.0
"""Seconds that a training waits for another one in its folder to end."""

FOLDER = "checkpoints"
CHECKSUM = ".sha256"
_NAME = re.compile(r"step-(\d{9})\.ckpt")


def checkpoint_path(out: Path, step: int) -> Path:
    """Where the checkpoint after that many steps is."""
    return out / FOLDER / f"step-{step:09d}.ckpt"


def step_of(path: Path) -> int:
    """Steps done when the checkpoint was written."""
    found = _NAME.fullmatch(path.name)
    if not found:
        raise ValueError(f"path: expected a name as step-000000500.ckpt, got {path.name}")
    return int(found[1])


def checkpoints(out: Path) -> list[Path]:
    """The run's checkpoints, whole or not, the newest first."""
    folder = out / FOLDER
    found = [path for path in folder.glob("step-*.ckpt") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def why_broken(path: Path) -> str | None:
    """What is wrong with a checkpoint's file, or None."""
    try:
        expected = path.with_name(path.name + CHECKSUM).read_text().split()[0]
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, IndexError, UnicodeDecodeError) as error:
        return f"{type(error).__name__}: {error}"
    return None if found == expected else "its checksum is another: the file is cut off or damaged"


def newest_whole(out: Path, tell: Callable[[str], None] = warnings.warn) -> Path | None:
    """The newest checkpoint that is whole; of newer ones that aren't, it is told why.

    Args:
        out: the run's folder.
        tell: is given a line for each broken checkpoint.
    """
    for path in checkpoints(out):
        reason = why_broken(path)
        if reason is None:
            return path
        tell(f"{path} can't be used ({reason}); falling back to the one before")
    return None


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that it has all of the bytes or its former ones, whatever happens meanwhile."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # some file systems can't sync folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def alone_in(out: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Within, no other training works in the folder; one that is about to end is waited for.

    The lock vanishes with the process, however it ends, and is not inherited by those that load its images.

    Raises:
        OutputError: another one does, still after ``patience`` seconds.
    """
    with (out / ".lock").open("a") as file:
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > end:
                    raise OutputError(f"out: expected no other training at work in {out}, got one") from None
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        yield


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's way to files: writes the checksum, then the checkpoint, each whole or not at all.

    A file system that refuses (a full disk) does not end the training: the checkpoints that are kept make room, all but
    the newest; if that isn't enough it is said, and training goes on with the checkpoints there are.

    Attributes:
        failed: why the last checkpoint could not be written, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failed: str | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        """Write ``checkpoint``; afterwards ``failed`` tells whether it could be."""
        path = Path(path)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        self.failed = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._write(path, buffer)
            except OSError:
                if not self._make_room(path):
                    raise
                self._write(path, buffer)
        except OSError as error:
            self.failed = f"{error.strerror or error}"
            left = next(iter(checkpoints(path.parent.parent)), None)
            kept = f"the last one is {left.name}" if left else "there is none yet"
            warnings.warn(f"no checkpoint written to {path} ({self.failed}); training goes on, {kept}", stacklevel=2)
            return
        prune(path.parent.parent)

    def _write(self, path: Path, buffer: io.BytesIO) -> None:
        data = buffer.getbuffer()
        digest = hashlib.sha256(data).hexdigest()
        # A checksum without its checkpoint harms nobody; a checkpoint without its checksum would count as broken.
        write_whole(path.with_name(path.name + CHECKSUM), f"{digest}  {path.name}\n".encode())
        write_whole(path, data)

    def _make_room(self, path: Path) -> bool:
        """Remove all checkpoints but the newest whole one; whether there were any to remove."""
        out = path.parent.parent
        kept = newest_whole(out, tell=lambda line: None)
        old = [other for other in checkpoints(out) if other != kept]
        for other in old:
            remove(other)
        return bool(old)


def remove(path: Path) -> None:
    """Remove a checkpoint and its checksum."""
    path.unlink(missing_ok=True)
    path.with_name(path.name + CHECKSUM).unlink(missing_ok=True)


def prune(out: Path) -> None:
    """Remove all but the last checkpoints, and what a killed process left half written."""
    for path in checkpoints(out)[KEPT:]:
        remove(path)
    for left in (out / FOLDER).glob(".step-*.part"):
        left.unlink(missing_ok=True)
    for checksum in (out / FOLDER).glob(f"step-*{CHECKSUM}"):
        if not checksum.with_name(checksum.name.removesuffix(CHECKSUM)).exists():
            checksum.unlink(missing_ok=True)
