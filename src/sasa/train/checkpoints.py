"""Checkpoints that are either complete or absent, and the newest intact one."""

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
from typing import IO, Any

from .._files import write_whole
from .errors import OutputError

KEPT = 3
"""Number of most recent checkpoints of a run that are kept."""

PATIENCE = 20.0
"""Seconds that a training run waits for another one in its folder to end."""

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{9})\.ckpt")


def checkpoint_path(out: Path, step: int) -> Path:
    """Path of the checkpoint after ``step`` steps."""
    return out / FOLDER / f"step-{step:09d}.ckpt"


def step_of(path: Path) -> int:
    """Number of steps completed when the checkpoint was written."""
    found = _NAME.fullmatch(path.name)
    if not found:
        raise ValueError(f"path: expected a name as step-000000500.ckpt, got {path.name}")
    return int(found[1])


def checkpoints(out: Path) -> list[Path]:
    """The run's checkpoints, intact or not, newest first."""
    return sorted(filter(lambda path: _NAME.fullmatch(path.name), (out / FOLDER).glob("step-*.ckpt")), reverse=True)


def why_broken(path: Path) -> str | None:
    """What is wrong with a checkpoint file; None if it is intact.

    It ends with its checksum, after the zip archive that ``torch.load`` reads. (The archive's own checksums are not
    enough: zip readers differ in how they handle damaged headers.)
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"{error.strerror}"
    return None if _checksum(content[:-64]) == content[-64:] else "it is cut off or damaged"


def _checksum(content: bytes | memoryview) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def newest_whole(out: Path, tell: Callable[[str], None] = warnings.warn) -> Path | None:
    """The newest intact checkpoint.

    Args:
        out: the run's folder.
        tell: called with a message for each newer checkpoint that is damaged.
    """
    for path in checkpoints(out):
        reason = why_broken(path)
        if reason is None:
            return path
        tell(f"{path} can't be used ({reason}); falling back to the one before")
    return None


@contextlib.contextmanager
def alone_in(
    out: Path, patience: float = PATIENCE, what: str = "training", inherited: bool = False
) -> Iterator[IO[str]]:
    """Context in which no other training uses the folder; one that is about to end is waited for.

    The lock is released with the process, however it ends. Its data-loading workers don't inherit it, unless
    ``inherited``: then every process that receives the file holds it too. The file records its holder.

    Raises:
        OutputError: another one still uses it after ``patience`` seconds.
    """
    take = fcntl.flock if inherited else fcntl.lockf
    with (out / ".lock").open("a+") as file:
        end = time.monotonic() + patience
        while True:
            try:
                take(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > end:
                    file.seek(0)
                    holders = ", ".join(file.read().split())
                    message = f"out: expected no other {what} at work in {out}, got process {holders}"
                    raise OutputError(f"{message}; on SIGTERM it saves and ends") from None
                time.sleep(0.2)
            except OSError:  # a file system without locking
                break
        note_holders(file, os.getpid())
        yield file


def note_holders(file: IO[str], *processes: int) -> None:
    """Record in a folder's lock file who holds it."""
    with contextlib.suppress(OSError):  # a full disk
        file.truncate(0)
        file.write(" ".join(map(str, processes)))
        file.flush()


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint, and remove all but the last ones.

    A failed write (a full disk) does not end the training: all other checkpoints except the newest intact one are
    removed to make room; if that isn't enough, there is a warning, and training continues with the existing
    checkpoints.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.write(_checksum(buffer.getvalue()))
    out = path.parent.parent
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_whole(path, buffer.getbuffer())
        except OSError:
            kept = newest_whole(out, tell=lambda line: None)
            old = [other for other in checkpoints(out) if other != kept]
            if not old:
                raise
            for other in old:
                other.unlink(missing_ok=True)
            write_whole(path, buffer.getbuffer())
    except OSError as error:
        left = next(iter(checkpoints(out)), None)
        kept = f"the last one is {left.name}" if left else "there is none yet"
        warnings.warn(f"no checkpoint written to {path} ({error.strerror}); training continues, {kept}", stacklevel=2)
        return
    for leftover in (*checkpoints(out)[KEPT:], *path.parent.glob(".step-*.part")):
        leftover.unlink(missing_ok=True)
