"""Classifying a folder of images, however many, on however many processes, from wherever the last attempt stopped."""

from __future__ import annotations

import csv
import hashlib
import heapq
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, RichProgressBar
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.datasets.folder import IMG_EXTENSIONS

from .batch import Batch, Taken, collate
from .checkpoints import write_whole
from .errors import DataError, OptionError, OutputError
from .evaluate import trained
from .fit import quiet
from .images import UnreadableImage, read_image
from .launch import Processes, find_processes, make_trainer
from .recipe import Precision, Recipe
from .transforms import Transform, fit_transform, normalise

ANY_NAME: Any = {"encoding": "utf-8", "errors": "surrogateescape"}  # file names may be any bytes
RUN = "run-{:04d}-{:05d}.csv"  # of one attempt and process


def predict(
    images: Path,
    out: Path,
    weights: Path = Path("runs/train/model.safetensors"),
    top_k: int = 5,
    batch_size: int = 256,
    workers: int = 0,
    precision: Precision = "32-true",
    accelerator: str = "auto",
    devices: int | str = "auto",
    num_nodes: int = 1,
) -> int:
    """Classify the images below a folder into a table: path, the most likely classes and their probabilities.

    The images are neither listed nor held in memory all at once. While it runs, rows gather in ``OUT.parts``; if it is
    cut off, the same command goes on with what is missing, on any number of processes. An image that can't be read has
    its reason in the last column.

    Args:
        images: folder; images anywhere below it are taken, in order of their paths.
        out: CSV file to write.
        weights: model.safetensors of a run.
        top_k: classes an image; all, where there are fewer.
        batch_size: images a batch, for each process.
        workers: processes that load images, for each process; 0 loads in it.
        precision: of the arithmetic.
        accelerator: as Lightning's: auto, cpu, gpu.
        devices: processes on this machine, as Lightning's; under torchrun and SLURM theirs count.
        num_nodes: machines; likewise.

    Returns:
        Rows in the table.

    Raises:
        DataError: no folder, no images in it, or no trained network.
        OutputError: the table exists already, or can't be written.
        OptionError: an option out of range.
    """
    network, facts = trained(weights)
    classes = facts["classes"]
    if top_k < 1:
        raise OptionError(f"top_k: expected at least 1, got {top_k}")
    top_k = min(top_k, len(classes))
    recipe = Recipe(
        batch_size=batch_size,
        workers=workers,
        precision=precision,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
    )
    recipe.check()
    if not images.is_dir():
        raise DataError(f"images: expected a folder, got {images}")
    if next(walk(images), None) is None:
        raise DataError(f"images: expected images ({', '.join(IMG_EXTENSIONS)}) below {images}, found none")
    if out.exists():
        raise OutputError(f"out: {out} exists already; remove it, or choose another name")
    processes = find_processes(recipe)
    parts = out.with_name(f"{out.name}.parts")
    _check_same_rows(parts, weights, top_k, images, processes.first)
    done = _done(parts)
    if done and processes.first:
        Console(stderr=True).print(f"going on: {len(done):,} images are done already", highlight=False)
    writer = RowWriter(parts, classes, top_k)
    size = facts["image_size"]
    fit, shape = fit_transform(size, facts.get("crop_pct", 1.0)), (facts["in_chans"], size, size)
    unread = UnreadImages(images, done, fit, shape, batch_size, processes)
    loader = DataLoader(unread, batch_size, num_workers=workers, collate_fn=collate)
    with quiet():
        trainer = make_trainer(
            recipe, processes, logger=False, callbacks=[RichProgressBar(), writer], enable_checkpointing=False
        )
        predictor = Predictor(network, normalise(tuple(facts["mean"]), tuple(facts["std"])))
        trainer.predict(predictor, loader, return_predictions=False)
    trainer.strategy.barrier()
    rows = 0
    if processes.first:
        rows = _merge(parts, out, top_k)
        Console().print(f"{rows:,} images classified into {out}", highlight=False, soft_wrap=True)
    return rows


def walk(folder: Path) -> Iterator[str]:
    """Images below a folder as paths relative to it, in order, one folder at a time in memory."""

    def below(prefix: str) -> Iterator[str]:
        try:
            with os.scandir(folder / prefix) as entries:
                # A folder's place is that of its name with the slash, so that paths come out in order as whole strings.
                found = sorted(e.name + "/" if e.is_dir(follow_symlinks=False) else e.name for e in entries)
        except OSError as error:
            raise DataError(f"images: {folder / prefix} can't be read: {error.strerror}") from error
        for name in found:
            if name.endswith("/"):
                yield from below(prefix + name)
            elif name.lower().endswith(IMG_EXTENSIONS):
                yield prefix + name

    return below("")


class UnreadImages(IterableDataset):
    """The images that have no row yet, shared out over processes and their workers a batch at a time.

    So the rows of a process come in order, whatever the number of its workers.

    Args:
        folder: the images.
        done: those that have a row.
        fit: brings an image to its size.
        shape: (C, S, S) of what comes; C = 1 takes the images grey.
        batch_size: of the loader.
        processes: that share them.
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

    def __init__(self, parts: Path, classes: Sequence[str], top_k: int) -> None:
        super().__init__("batch")
        self.parts, self.classes, self.top_k = parts, classes, top_k
        self.file: Path | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Choose the attempt's number: all processes the same."""
        self.parts.mkdir(parents=True, exist_ok=True)
        attempts = [int(path.name.split("-")[1]) for path in self.parts.glob("run-*.csv")]
        attempt = trainer.strategy.broadcast(max(attempts, default=-1) + 1)
        self.file = self.parts / RUN.format(attempt, trainer.global_rank)

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
        """A row an image, then to the disk."""
        probabilities, found = prediction.topk(self.top_k)
        with self.file.open("a", newline="", **ANY_NAME) as file:  # type: ignore[union-attr]
            writer = csv.writer(file)
            for name, reason, row, labels in zip(
                batch.names, batch.unreadable, probabilities.tolist(), found.tolist(), strict=True
            ):
                guesses = [g for label, p in zip(labels, row, strict=True) for g in (self.classes[label], f"{p:.6f}")]
                writer.writerow([name, *([""] * len(guesses) if reason else guesses), reason])


def _check_same_rows(parts: Path, weights: Path, top_k: int, images: Path, first: bool) -> None:
    """Note whose rows these are, and go on with no others.

    Raises:
        OutputError: the rows there are of another network, folder or number of classes; or none can be written.
    """
    with weights.open("rb") as file:
        now = {"weights": hashlib.file_digest(file, "sha256").hexdigest(), "top_k": top_k}
    now["images"] = str(images.resolve())
    note = parts / "rows.json"
    try:
        parts.mkdir(parents=True, exist_ok=True)
        if first and not note.exists():  # one process alone: several would take each other's half-written file
            write_whole(note, json.dumps(now).encode())
        before = json.loads(note.read_text()) if note.exists() else now
    except ValueError as error:
        raise OutputError(f"out: {note} can't be read: {error}") from error
    except OSError as error:
        raise OutputError(f"out: can't write to {parts}: {error.strerror}") from error
    other = [name for name in now if before.get(name) != now[name]]
    if other:
        raise OutputError(
            f"out: {parts} holds rows made with other {', '.join(other)}; remove it, or choose another name"
        )


def _done(parts: Path) -> set[str]:
    """The images that have a whole row; half a row at the end of a file is cut off."""
    done: set[str] = set()
    for path in sorted(parts.glob("run-*.csv")) if parts.is_dir() else ():
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) != len(text):
            os.truncate(path, len(whole))
        with path.open(newline="", **ANY_NAME) as file:
            done.update(row[0] for row in csv.reader(file))
    return done


def _merge(parts: Path, out: Path, top_k: int) -> int:
    """One table in order of the paths, of parts that each are: no more than a row of each in memory."""

    def rows(path: Path) -> Iterator[list[str]]:
        with path.open(newline="", **ANY_NAME) as file:
            yield from csv.reader(file)

    header = ["path", *(f"{what}_{k}" for k in range(1, top_k + 1) for what in ("class", "probability")), "error"]
    beside = out.with_name(f".{out.name}.part")
    count = 0
    try:
        with beside.open("w", newline="", **ANY_NAME) as file:
            writer = csv.writer(file)
            writer.writerow(header)
            for row in heapq.merge(*map(rows, sorted(parts.glob("run-*.csv"))), key=lambda row: row[0]):
                writer.writerow(row)
                count += 1
            file.flush()
            os.fsync(file.fileno())
        beside.replace(out)
    except OSError as error:
        raise OutputError(f"out: can't write {out}: {error.strerror}; the rows are in {parts}") from error
    shutil.rmtree(parts)
    return count
