"""The log of a run, in metrics.csv and for TensorBoard. A resumed run appends; a full disk doesn't end the training."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from .._files import write_whole

COLUMNS = (
    "epoch",
    "step",
    "train_loss",
    "val_loss",
    "val_top1",
    "val_top5",
    "val_ap",
    "val_ap50",
    "learning_rate",
    "images_per_second",
    "data_wait",
    "memory_gb",
)
"""Columns of ``metrics.csv``. ``step`` counts from 0 and is the last step that the line covers."""

HEADER = ",".join(COLUMNS).encode() + b"\r\n"
ROW = re.compile(rb"\d{0,9}(\.0)?,(\d{1,9})(,[-+.\dnaife]{0,40}){%d}" % (len(COLUMNS) - 2))
WAITING = 100
"""Number of lines that are buffered and written together."""


class RunLog(Logger):
    """A line of ``metrics.csv`` for each call, and TensorBoard's event files.

    Lines of an earlier log from ``steps`` on are removed, since they will be logged again; so is anything that isn't a
    log line.

    Args:
        out: the run's folder.
        steps: steps completed so far.
        tensorboard: whether to write TensorBoard's files too.
    """

    def __init__(self, out: Path, steps: int, tensorboard: bool) -> None:
        super().__init__()
        self.path, self.steps, self.tensorboard = out / "metrics.csv", steps, tensorboard
        self._lines: list[str] = []
        self._events: Any = None
        self._warned: set[str] = set()

    @property
    def name(self) -> None:
        """None: the folder carries the run's name."""

    @property
    def version(self) -> None:
        """None, which keeps it out of the progress bar."""

    @rank_zero_only
    def begin(self) -> None:
        """Clean up the earlier log, and open TensorBoard's."""
        rows = self.path.read_bytes().splitlines() if self.path.exists() else []
        matches = [ROW.fullmatch(row) for row in rows]
        kept = [found[0] for found in matches if found and int(found[2]) < self.steps]
        write_whole(self.path, HEADER + b"".join(row + b"\r\n" for row in kept))
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=self.steps or None)

    def log_hyperparams(self, *arguments: Any, **options: Any) -> None:
        """Ignored: they are in recipe.json."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a line."""
        values = {**metrics, "step": step}
        self._lines.append(",".join(str(values.get(column, "")) for column in COLUMNS) + "\r\n")
        if self._events is not None:
            for name, value in metrics.items():
                self._try("TensorBoard's files", lambda n=name, v=value: self._events.add_scalar(n, v, step))
        if len(self._lines) >= WAITING:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Append the buffered lines; what can't be written stays buffered."""
        if self._lines:
            self._try(str(self.path), self._append)
        if self._events is not None:
            self._try("TensorBoard's files", self._events.flush)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()
        if self._events is not None:
            self._try("TensorBoard's files", self._events.close)

    def _append(self) -> None:
        size = self.path.stat().st_size
        try:
            with self.path.open("ab") as file:
                file.write("".join(self._lines).encode())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)  # a partial line would corrupt the file
            raise
        self._lines = []

    def _try(self, what: str, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            if what not in self._warned:
                warnings.warn(f"{what} can't be written ({error.strerror}); training continues", stacklevel=3)
            self._warned.add(what)
