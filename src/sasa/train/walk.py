"""Images below a folder, the same ones for training and prediction.

Hidden files and folders are skipped, and so are those that operating systems and programs leave among images. Links are
followed, but every real folder is read once, under the first of its paths by name, so a link to a parent causes no
loop.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from .errors import DataError

VALIDATION_NAMES = ("val", "valid", "validation", "test")

NOT_IMAGES = {
    "__MACOSX",
    "__pycache__",
    "@eaDir",
    "#recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
}


def skipped(name: str) -> bool:
    """Whether a file or folder of this name is always skipped."""
    return name.startswith(".") or name in NOT_IMAGES


def walk(folder: Path) -> Iterator[str]:
    """Images as paths relative to ``folder``, sorted by the whole path, with one folder at a time in memory.

    Raises:
        DataError: a folder can't be read.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [""]  # folders, which end with a slash, and images: the last is the next in order
    while waiting:
        path = waiting.pop()
        if path and not path.endswith("/"):
            yield path
            continue
        real, found = _listed(folder / path)
        if real not in seen:
            seen.add(real)
            waiting += sorted((path + name for name in found), reverse=True)


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in ``folder`` that :func:`walk` reads, in order; links to it or its parents are excluded."""
    parents = {folder.resolve(), *folder.resolve().parents}
    _, found = _listed(folder)
    return sorted(name[:-1] for name in found if name[-1] == "/" and (folder / name).resolve() not in parents)


def _listed(folder: Path) -> tuple[tuple[int, int], list[str]]:
    """The folder's identity, whatever its path; its images, and its subfolders with a trailing slash."""
    try:
        status = folder.stat()
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not skipped(entry.name)]
        folders = {e.name for e in found if e.is_dir(follow_symlinks=False) or (e.is_symlink() and Path(e).is_dir())}
    except OSError as error:
        raise DataError(f"data: {folder} can't be read: {error.strerror}") from error
    images = [e.name for e in found if e.name not in folders and e.name.lower().endswith(IMG_EXTENSIONS)]
    return (status.st_dev, status.st_ino), [*images, *(f"{name}/" for name in folders)]
