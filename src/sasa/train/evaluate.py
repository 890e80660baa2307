"""Evaluation of a trained network, on one process or many. Imports Lightning and timm only when called."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import write_whole
from .errors import DataError, OutputError
from .folder import check_folder
from .recipe import Precision, Recipe

if TYPE_CHECKING:
    from torch import nn


def evaluate(
    weights: Path = Path("runs/train/model.safetensors"),
    data: Path | None = None,
    out: Path | None = None,
    batch_size: int = 256,
    workers: int = 0,
    strict: bool = False,
    precision: Precision = "32-true",
    accelerator: str = "auto",
    devices: int | str = "auto",
    num_nodes: int = 1,
) -> dict[str, Any]:
    """Measure a trained network's accuracy on validation images, each counted once over all processes.

    For a detector, compute COCO's table of average precisions.

    Args:
        weights: model.safetensors of a run, or clothing or fashion_mnist, which ship with the package.
        data: folder of images, as for sasa train; its validation part is used. Default: the packaged images.
        out: JSON file to write the figures to.
        batch_size: images per batch, over all processes together.
        workers: worker processes that load images, per process; 0 loads in the process itself.
        strict: reject unreadable images instead of skipping them with a warning.
        precision: numeric precision.
        accelerator: as in Lightning: auto, cpu, gpu.
        devices: processes on this machine, as in Lightning; torchrun and SLURM override it.
        num_nodes: machines; likewise.

    Returns:
        ``top1``, ``top5`` and ``val_loss``, or for a detector ``ap``, ``ap50`` and the rest of COCO's twelve metrics
        (-1 if there are no boxes of that size); the number of ``images`` evaluated, and of those ``skipped``.

    Raises:
        DataError: data can't be read, its classes or channels differ from the network's, or the loss is not finite.
        OptionError: an option is out of range.
        OutputError: out is a folder, or can't be written.
    """
    from lightning.pytorch.callbacks import RichProgressBar
    from rich.console import Console

    from .callbacks import Watch
    from .fit import everyones, quiet
    from .launch import find_processes, make_trainer
    from .task import task_of

    if out is not None:
        if out.is_dir():
            raise OutputError(f"out: expected a file, got the folder {out}")
        check_folder(out.parent, overwrite=True)
    network, facts = trained(weights)
    task = task_of(facts["model"])
    source = task.open(data, strict)
    if source.classes == [str(label) for label in range(len(facts["classes"]))]:
        source = source._replace(classes=list(facts["classes"]))  # IDX files have numbers, not names
    if list(facts["classes"]) != source.classes or facts["in_chans"] != source.channels:
        raise DataError(
            f"data: expected the {len(facts['classes'])} classes that the network was trained on "
            f"({_few(facts['classes'])}; {facts['in_chans']} channels), got {len(source.classes)} "
            f"({_few(source.classes)}; {source.channels} channels)"
        )
    # Normalised as in training, regardless of the mean of these images.
    source = source._replace(mean=tuple(facts["mean"]), std=tuple(facts["std"]))
    recipe = Recipe(
        **{name: facts[name] for name in ("model", "model_options", "image_size", "crop_pct") if name in facts},
        data=data,
        augment="none",
        batch_size=batch_size,
        workers=workers,
        strict=strict,
        precision=precision,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
    )
    recipe.check()
    processes = find_processes(recipe)
    batches = task.data(source, recipe, processes.rank, processes.world_size)
    watch = Watch(1, batch_size)
    with quiet():
        trainer = make_trainer(
            recipe, processes, logger=False, callbacks=[RichProgressBar(), watch], enable_checkpointing=False
        )
        (metrics,) = trainer.validate(task.module(network, source, recipe, steps=1), batches, verbose=False)
    figures: dict[str, Any] = dict(task.figures(dict(metrics)))
    if not math.isfinite(figures.get("val_loss", 0.0)):
        raise DataError(f"weights: expected a finite loss of the network in {weights}, got {figures['val_loss']}")
    skipped = len(everyones(watch.unreadable_val))
    figures |= {"images": len(source.val) - skipped, "skipped": source.skipped + skipped}
    if processes.first:
        if out is not None:
            try:
                out.parent.mkdir(parents=True, exist_ok=True)
                write_whole(out, (json.dumps(figures, indent=2) + "\n").encode())
            except OSError as error:
                raise OutputError(f"out: can't write {out}: {error.strerror}; got {figures}") from error
        line = f"{facts['model']}, on {figures['images']:,} images: {task.summary(figures)}"
        Console().print(line, highlight=False, markup=False, soft_wrap=True)
    return figures


def trained(weights: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network in a file, and its facts.

    Raises:
        DataError: the file contains none.
    """
    from .weights import load_model

    try:
        return load_model(weights, detectors=True)
    except (ValueError, OSError) as error:
        raise DataError(
            f"weights: expected model.safetensors of a run of sasa train, got {weights}: {error}"
        ) from error


def _few(classes: list[str]) -> str:
    return ", ".join(classes[:4]) + (", …" if len(classes) > 4 else "")
