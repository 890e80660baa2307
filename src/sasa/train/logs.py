"""Logs that a continued run goes on with, and that a full disk doesn't end the training over."""

from __future__ import annotations

import csv
import io
import os
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from .checkpoints import write_whole

COLUMNS = (
    "epoch",
    "step",
    "train_loss",
    "val_loss",
    "val_top1",
    "val_top5",
    "learning_rate",
    "images_per_second",
    "data_wait",
    "memory_gb",
)
"""Of ``metrics.csv``. ``step`` counts from 0 and is the last one that the line tells of."""


class _Writer(ExperimentWriter):
    """Appends to a file that is there already."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.metrics_keys = list(COLUMNS)
        self._told = False

    def _check_log_dir_exists(self) -> None:
        """Keep the former log: :func:`open_logs` has taken from it what is done again."""

    def _record_new_keys(self) -> set[str]:
        """Keep the columns in their order, as the file has them."""
        new = sorted(set().union(*self.metrics) - set(self.metrics_keys))
        self.metrics_keys += new
        return set(new)

    def save(self) -> None:
        """Append the lines since the last time; what can't be written waits for the next."""
        path = Path(self.metrics_file_path)
        size = path.stat().st_size if path.exists() else 0
        try:
            super().save()
        except OSError as error:
            if path.exists():
                os.truncate(path, size)  # half a line would spoil the file
            if not self._told:
                warnings.warn(f"{path} can't be written ({error.strerror}); its lines wait", stacklevel=2)
            self._told = True


class ContinuedCSVLogger(CSVLogger):
    """Lightning's, that goes on with the ``metrics.csv`` there is."""

    @property
    def experiment(self) -> Any:
        """The writer; only the first process has one that writes."""
        if self._experiment is None and getattr(rank_zero_only, "rank", 0) == 0:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _Writer(self.log_dir)
        return super().experiment


class ForgivingTensorBoardLogger(TensorBoardLogger):
    """Lightning's, that falls silent where it can't write."""

    _silent = False

    def _try(self, function: Any, *arguments: Any, **options: Any) -> None:
        if self._silent:
            return
        try:
            function(*arguments, **options)
        except OSError as error:
            self._silent = True
            warnings.warn(f"TensorBoard's files can't be written ({error.strerror}): no more of them", stacklevel=3)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log, if the disk lets it."""
        self._try(super().log_metrics, metrics, step)

    def save(self) -> None:
        """Flush, if the disk lets it."""
        self._try(super().save)

    def finalize(self, status: str) -> None:
        """Close, if the disk lets it."""
        self._try(super().finalize, status)


def open_logs(out: Path, steps: int, tensorboard: bool, first: bool) -> list[Any]:
    """Loggers that go on after that many steps: later lines of a former log are dropped, for they come again.

    Args:
        out: the run's folder.
        steps: done so far.
        tensorboard: whether to write TensorBoard's files too.
        first: whether this process is the one that writes.
    """
    log = out / "metrics.csv"
    if first and log.exists():
        write_whole(log, _until(log, steps).encode())
    loggers: list[Any] = [ContinuedCSVLogger(out, name="", version="")]
    if tensorboard:
        loggers.append(ForgivingTensorBoardLogger(out, name="", version="tensorboard", purge_step=steps or None))
    return loggers


def _until(log: Path, steps: int) -> str:
    """The log's lines of the first ``steps`` steps."""
    with log.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit() and int(row["step"]) < steps]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list[Any](COLUMNS), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
