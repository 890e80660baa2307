"""Problems in annotations, by kind: counted, with a few examples of each."""

from __future__ import annotations

import warnings
from collections import defaultdict

from ..train.errors import DataError

EXAMPLES = 3
"""Number of examples named for each kind of problem."""

OUTSIDE = "boxes outside their image, left out"
CLIPPED = "boxes partly outside their image, clipped to it"
EMPTY = "boxes of zero area, left out"
SWAPPED = "boxes with swapped corners (a negative width or height), left out"
NOT_FINITE = "boxes with coordinates that are not finite, left out"
NO_CATEGORY = "boxes of an unknown category, left out"
NO_IMAGE = "boxes of an image that is not listed, left out"
NO_FILE = "images without a file, left out with their boxes"
NO_BOXES = "images without boxes, kept as background"
NO_ANNOTATION = "annotation files that can't be read, left out with their images"

HARMLESS = frozenset((NO_BOXES,))
"""Kinds that are counted but not warned about, because they are common."""


class Problems:
    """Counts the problems in the annotations of one file or folder.

    Args:
        where: the file or folder, for messages.

    Attributes:
        counts: how often, by kind.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.counts: dict[str, int] = defaultdict(int)
        self._examples: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, example: str) -> None:
        """Count another problem of a kind."""
        self.counts[kind] += 1
        if len(self._examples[kind]) < EXAMPLES:
            self._examples[kind].append(example)

    def report(self, strict: bool = False) -> None:
        """Warn once about every kind.

        Raises:
            DataError: there are problems, and ``strict`` is on.
        """
        lines = []
        for kind, count in self.counts.items():
            if kind not in HARMLESS:
                examples = "; ".join(self._examples[kind]) + ("; …" if count > EXAMPLES else "")
                lines.append(f"{count} {kind} ({examples})")
        if lines and strict:
            raise DataError(f"data: {self.where}: expected sound annotations, got {'; '.join(lines)}")
        for line in lines:
            warnings.warn(f"{self.where}: {line}", stacklevel=2)
