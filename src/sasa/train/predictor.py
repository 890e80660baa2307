"""The parts that Lightning runs to classify a folder: the images without a row, the network, and the row writer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info

from .batch import Batch, Taken
from .errors import OutputError
from .images import UnreadableImage, read_image
from .launch import Processes
from .predict import Rows
from .transforms import Transform
from .walk import walk

RUN = "run-{:04d}-{:05d}.jsonl"  # one per attempt and process


class UnreadImages(IterableDataset):
    """The images without a row, distributed over processes and their workers a batch at a time.

    The rows of a process thus come in order, whatever the number of its workers.

    Args:
        folder: the images.
        done: images that have a row.
        fit: resizes an image.
        shape: (C, S, S) of the output; C = 1 converts images to grey.
        batch_size: of the loader.
        processes: number of processes that share them.
    """

    def __init__(
        self,
        folder: Path,
        done: set[str],
        fit: Transform,
        shape: tuple[int, int, int],
        batch_size: int,
        processes: Processes,
    ) -> None:
        self.folder, self.done, self.fit, self.batch_size = folder, done, fit, batch_size
        self.rank, self.world_size = processes.rank, processes.world_size
        self.blank = torch.zeros(shape, dtype=torch.uint8)

    def __iter__(self) -> Iterator[Taken]:
        worker = get_worker_info()
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        missing = (path for path in walk(self.folder) if path not in self.done)
        for place, path in enumerate(missing):
            if place // self.batch_size % (self.world_size * workers) != self.rank * workers + own:
                continue
            try:
                image = read_image(self.folder / path)
            except UnreadableImage as error:
                yield Taken(self.blank, 0, path, error.reason)
                continue
            yield Taken(self.fit(image.convert("L") if len(self.blank) == 1 else image), 0, path)


class Predictor(lightning.LightningModule):
    """Probabilities of the classes."""

    def __init__(self, network: nn.Module, normalised: Transform) -> None:
        super().__init__()
        self.network, self.normalised = network, normalised

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """(B, classes)."""
        return self.network(self.normalised(batch.images)).float().softmax(1)


class RowWriter(BasePredictionWriter):
    """Appends each batch's rows to the file of this attempt and process."""

    def __init__(self, table: Rows) -> None:
        super().__init__("batch")
        self.table = table
        self.file = Path()

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Choose the attempt's number, the same in all processes."""
        attempts = [int(path.name.split("-")[1]) for path in self.table.files()]
        attempt = trainer.strategy.broadcast(max(attempts, default=-1) + 1)
        self.file = self.table.parts / RUN.format(attempt, trainer.global_rank)

    def write_on_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        prediction: Tensor,
        batch_indices: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one row per image, and flush to disk."""
        lines = [json.dumps(row) + "\n" for row in self.table.made(batch, prediction)]
        try:
            with self.file.open("a") as file:
                file.writelines(lines)
        except OSError as error:
            raise OutputError(
                f"out: can't write to {self.file}: {error.strerror}; the same command resumes from the rows so far"
            ) from error
