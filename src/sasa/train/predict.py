"""Prediction for a folder of any number of images, on any number of processes, resuming where the last attempt stopped:
classes in a table, or boxes with a detector.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import heapq
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

from .._files import write_whole
from .checkpoints import alone_in
from .errors import DataError, OptionError, OutputError
from .recipe import Precision, Recipe

TRAINED = Path("runs/train/model.safetensors")
ANY_NAME: Any = {"encoding": "utf-8", "errors": "surrogateescape"}  # file names may be any bytes
PATIENCE = 5.0  # seconds to wait for another predict that is about to end


def predict(
    images: Path,
    out: Path,
    weights: Path | None = None,
    top_k: int = 5,
    pictures: Path | None = None,
    threshold: float = 0.5,
    batch_size: int = 256,
    workers: int = 0,
    precision: Precision = "32-true",
    accelerator: str = "auto",
    devices: int | str = "auto",
    num_nodes: int = 1,
) -> int:
    """Classify the images below a folder into a table: path, the most likely classes and their probabilities.

    A detector writes COCO's results instead, a JSON list of ``{"image_id", "category_id", "bbox", "score"}`` plus the
    ``file_name``. ``image_id`` is the number in the file's name if all names are distinct numbers, as in COCO;
    otherwise the position in path order, from 1.

    The images are neither listed nor held in memory all at once. During the run, rows are collected in ``OUT.parts``;
    if it is interrupted, the same command resumes with the missing ones, on any number of processes. For an image that
    can't be read, the last column gives the reason.

    Args:
        images: folder; all images below it are used, in order of their paths. Hidden and system folders are skipped;
            links are followed, and every real folder is read once.
        out: CSV file to write, or JSON with a detector.
        weights: model.safetensors of a run, or clothing or fashion_mnist, which ship with the package. Default:
            runs/train/model.safetensors if it exists, else clothing.
        top_k: classes per image; all if there are fewer. Not used by a detector.
        pictures: folder to write the images to with a detector's boxes drawn, each as PATH.png.
        threshold: minimum score of the boxes that are drawn; the results contain all of them.
        batch_size: images per batch, for each process.
        workers: worker processes that load images, per process; 0 loads in the process itself.
        precision: numeric precision.
        accelerator: as in Lightning: auto, cpu, gpu.
        devices: processes on this machine, as in Lightning; torchrun and SLURM override it.
        num_nodes: machines; likewise.

    Returns:
        Rows in the table.

    Raises:
        DataError: there is no folder, no images in it, or no trained network.
        OutputError: the table already exists, can't be written, or another predict is working on it.
        OptionError: an option is out of range.
    """
    # Imported here because they take seconds, and help and option errors don't need them.
    from lightning.pytorch.callbacks import RichProgressBar
    from rich.console import Console
    from torch.utils.data import DataLoader

    from ..models.pretrained import find_weights
    from .evaluate import trained
    from .fit import quiet
    from .launch import find_processes, make_trainer
    from .predictor import RowWriter, UnreadImages
    from .task import task_of
    from .walk import IMG_EXTENSIONS, walk

    console = Console(stderr=True)
    if weights is None:
        weights = TRAINED if TRAINED.is_file() else Path("clothing")
        console.print(f"weights: {weights}", highlight=False, soft_wrap=True)
    network, facts = trained(weights)
    weights = find_weights(weights)
    if top_k < 1:
        raise OptionError(f"top_k: expected at least 1, got {top_k}")
    top_k = min(top_k, len(facts["classes"]))
    if not 0 <= threshold <= 1:
        raise OptionError(f"threshold: expected from 0 to 1, got {threshold}")
    parts = out.with_name(f"{out.name}.parts")
    task = task_of(facts["model"])
    table, predictor, fit, shape = task.prediction(network, facts, parts, top_k, pictures, threshold)
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
    with _alone(parts, out) if processes.first else contextlib.nullcontext():
        _check_same_rows(parts, weights, top_k, images, processes.first)
        done = {row[0] for row in table}
        if done and processes.first:
            console.print(f"resuming: {len(done):,} images are done already", highlight=False)
        unread = UnreadImages(images, done, fit, shape, batch_size, processes)
        loader = DataLoader(unread, batch_size, num_workers=workers, collate_fn=task.data.collate)
        with quiet():
            callbacks = [RichProgressBar(), RowWriter(table)]
            trainer = make_trainer(recipe, processes, logger=False, callbacks=callbacks, enable_checkpointing=False)
            trainer.predict(predictor, loader, return_predictions=False)
        trainer.strategy.barrier()
        rows = 0
        if processes.first:
            rows = table.write(out)
            shutil.rmtree(parts)
            Console().print(f"{rows:,} images {table.verb} into {out}", highlight=False, soft_wrap=True)
    return rows


@contextlib.contextmanager
def _alone(parts: Path, out: Path) -> Iterator[None]:
    """Context in which no other predict works on the same table."""
    with contextlib.ExitStack() as stack:
        try:
            parts.mkdir(parents=True, exist_ok=True)
            stack.enter_context(alone_in(parts, PATIENCE))
        except OutputError:
            raise OutputError(f"out: expected no other predict at work on {out}, got one") from None
        except OSError as error:
            raise OutputError(f"out: can't write to {parts}: {error.strerror}") from error
        if out.exists():  # another one has finished in the meantime
            raise OutputError(f"out: {out} exists already; remove it, or choose another name")
        yield


class Rows:
    """The rows written so far, one JSON line each, in files that are each sorted by path.

    A truncated or damaged line doesn't count: its image is classified again.
    """

    verb = "classified"

    def __init__(self, parts: Path, classes: Sequence[str], top_k: int) -> None:
        self.parts, self.classes, self.top_k = parts, classes, top_k
        guesses = (f"{what}_{k}" for k in range(1, top_k + 1) for what in ("class", "probability"))
        self.header = ["path", *guesses, "error"]
        self._known = set(classes)

    def files(self) -> list[Path]:
        """The files: one per attempt and process."""
        return sorted(self.parts.glob("run-*.jsonl"))

    def __iter__(self) -> Iterator[list[str]]:
        """In path order, each once, with at most one row of each file in memory."""
        last = None
        for row in heapq.merge(*map(self._read, self.files()), key=itemgetter(0)):
            if row[0] != last:
                yield row
            last = row[0]

    def _read(self, path: Path) -> Iterator[list[str]]:
        with path.open("rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, RecursionError):
                    row = json.loads(line)
                    if line.endswith(b"\n") and self._is_whole(row):
                        yield row

    def _is_whole(self, row: Any) -> bool:
        if not (isinstance(row, list) and len(row) == len(self.header) and all(isinstance(c, str) for c in row)):
            return False
        path, *guesses, reason = row
        if reason:
            return bool(path) and not any(guesses)
        return bool(path) and self._known.issuperset(guesses[::2]) and all(0 <= float(p) <= 1 for p in guesses[1::2])

    def made(self, batch: Any, prediction: Any) -> Iterator[list[str]]:
        """The rows of a batch, from (B, classes) probabilities."""
        probabilities, found = prediction.topk(self.top_k)
        for name, reason, row, labels in zip(
            batch.names, batch.unreadable, probabilities.tolist(), found.tolist(), strict=True
        ):
            if not reason and not all(map(math.isfinite, row)):
                reason = "the network's output is not finite"
            guesses: Any = [g for n, p in zip(labels, row, strict=True) for g in (self.classes[n], f"{p:.6f}")]
            yield [name, *([""] * len(guesses) if reason else guesses), reason]

    def write(self, out: Path) -> int:
        """Write the complete file; returns the number of rows."""
        beside = out.with_name(f".{out.name}.part")
        try:
            with beside.open("w", newline="", **ANY_NAME) as file:
                count = self.write_to(file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(out)
        except OSError as error:
            raise OutputError(f"out: can't write {out}: {error.strerror}; the rows are in {self.parts}") from error
        return count

    def write_to(self, file: IO[str]) -> int:
        """Write the table as CSV; returns the number of rows."""
        writer, count = csv.writer(file), 0
        writer.writerow(self.header)
        for count, row in enumerate(self, 1):  # noqa: B007
            writer.writerow(row)
        return count


def _check_same_rows(parts: Path, weights: Path, top_k: int, images: Path, first: bool) -> None:
    """Record what these rows belong to, and refuse to resume from any others.

    Raises:
        OutputError: the existing rows belong to another network, folder or number of classes; or none can be written.
    """
    with weights.open("rb") as file:
        now = {"weights": hashlib.file_digest(file, "sha256").hexdigest(), "top_k": top_k}
    now["images"] = str(images.resolve())
    note = parts / "rows.json"
    try:
        if note.exists():
            before = json.loads(note.read_text())
        elif any(parts.glob("run-*")):
            raise ValueError("it is missing, and there are rows")
        else:
            before = now
            if first:  # a single process: several could read each other's half-written file
                write_whole(note, json.dumps(now).encode())
        if not isinstance(before, dict):
            raise ValueError("expected a dict")
    except (ValueError, IsADirectoryError, RecursionError) as error:
        raise OutputError(f"out: {note} can't be read ({error}); remove {parts}, or choose another name") from error
    except OSError as error:
        raise OutputError(f"out: can't write to {parts}: {error.strerror}") from error
    other = [name for name in now if before.get(name) != now[name]]
    if other:
        raise OutputError(
            f"out: {parts} holds rows made with other {', '.join(other)}; remove it, or choose another name"
        )
