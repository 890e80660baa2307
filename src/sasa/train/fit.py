"""Training: from a recipe to checkpoints, logs, weights and a result."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, Timer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from rich.console import Console
from torch import nn

from ..models import count_flops, create_model
from .callbacks import FiniteLoss, Progress, SaveAndStop, Watch
from .checkpoints import WholeCheckpoints, alone_in, checkpoints, newest_whole, step_of, write_whole
from .data import ImageData
from .errors import OptionError, OutputError
from .export import save_weights
from .launch import Processes, find_processes, make_trainer, restarts
from .logs import open_logs
from .module import Classifier, ShardedClassifier
from .order import seed_everything
from .recipe import FREE_TO_CHANGE, Recipe
from .sources import Source, open_source
from .sync_batch_norm import synchronised, unsynchronised

Resume = Literal["never", "auto"]

FILES = ("metrics.csv", "result.json", "model.safetensors", "recipe.json", "curves.png")


@dataclass(frozen=True)
class Result:
    """What a training run came to.

    Attributes:
        model: name of the network.
        top1: share of validation images classified rightly after the last epoch, from 0 to 1.
        parameters: of the network.
        flops: of one image's forward; a multiply-add is 2.
        seconds_per_epoch: of training, validation not included.
        epochs: passes over the training images.
        train_images: images trained on.
        val_images: images validated on.
        skipped_images: unreadable images left out.
        top5: share whose class is among the first five guesses.
        val_loss: cross-entropy on the validation images.
    """

    model: str
    top1: float
    parameters: int
    flops: int
    seconds_per_epoch: float
    epochs: int
    train_images: int
    val_images: int
    skipped_images: int
    top5: float = math.nan
    val_loss: float = math.nan


def train(
    recipe: Recipe, out: Path = Path("runs/train"), *, resume: Resume = "never", overwrite: bool = False
) -> Result:
    """Train a network on images and write its weights, log and result.

    Writes to ``out``: ``checkpoints/`` (the last three, each with its checksum), ``metrics.csv``, TensorBoard's files,
    ``model.safetensors`` (weights, with what is needed to use them), ``curves.png``, ``recipe.json`` and, at the very
    end, ``result.json``.

    Args:
        recipe: the network, the images and how it is trained.
        out: folder to write to.
        resume: auto continues the run in ``out`` from its newest whole checkpoint, or starts it; one that is
            finished is left as it is. never refuses a folder that isn't empty.
        overwrite: replace an earlier run in ``out``.

    Raises:
        DataError: data can't be trained on.
        OutputError: out can't be written, or holds a run and overwrite is off.
        OptionError: an option out of range, or other than in the run that is to be continued.
        NonFiniteLoss: the loss is no number any more.
        Stopped: a signal asked to stop; the checkpoint is written.
    """
    recipe.check()
    if resume == "auto" and overwrite:
        raise OptionError("overwrite: expected it without resume auto, which goes on with the earlier run; got both")
    processes = find_processes(recipe)
    if restarts():  # torchrun has started all processes anew because one failed
        resume, overwrite = "auto", False
    if resume == "auto" and (out / "result.json").is_file():
        _check_same_run(out, recipe)
        return Result(**json.loads((out / "result.json").read_text()))
    if processes.first:
        prepare_folder(out, overwrite, resume == "auto")
    with alone_in(out) if processes.first else contextlib.nullcontext():
        return _train(recipe, out, resume == "auto", overwrite, processes)


def _train(recipe: Recipe, out: Path, resume: bool, overwrite: bool, processes: Processes) -> Result:
    # Other processes don't look for what the first may be about to remove.
    checkpoint = newest_whole(out, _tell if processes.first else lambda line: None) if resume else None
    if checkpoint is not None:
        _check_same_run(out, recipe)
        if processes.first:
            _tell(f"going on after step {step_of(checkpoint)}, from {checkpoint}")
    source = open_source(recipe.data, recipe.strict)
    seed_everything(recipe.seed)
    try:
        network = create_model(recipe.model, len(source.classes), source.channels, **recipe.model_options)
    except (ValueError, TypeError) as error:
        raise OptionError(f"model_options: {error}") from error
    return fit(recipe, network, source, out, checkpoint, processes, overwrite=overwrite)


def fit(
    recipe: Recipe,
    network: nn.Module,
    source: Source,
    out: Path,
    checkpoint: Path | None = None,
    processes: Processes | None = None,
    *,
    overwrite: bool = False,
) -> Result:
    """Train ``network`` on ``source``, from ``checkpoint`` on if given, and write the files of :func:`train`.

    ``overwrite`` removes those of an earlier run, once it is sure that this one can begin.
    """
    processes = processes or find_processes(recipe)
    batches = ImageData(source, recipe, processes.rank, processes.world_size)
    if processes.first:
        if overwrite:
            _remove_run(out)
        write_whole(out / "recipe.json", (json.dumps(recipe.as_dict(), indent=2) + "\n").encode())
    if recipe.channels_last:
        network = network.to(memory_format=torch.channels_last)
    if processes.world_size > 1 and recipe.sync_batchnorm:
        network = synchronised(network, gpu=processes.accelerator != "cpu")
    if recipe.compile:
        network.compile()
    build = ShardedClassifier if recipe.strategy == "fsdp" else Classifier
    classifier = build(network, len(source.classes), recipe, batches.steps_per_epoch * recipe.epochs)
    timer, watch = Timer(), Watch(recipe.log_steps, recipe.batch_size)
    with quiet():
        trainer = _trainer(recipe, processes, out, checkpoint, [timer, watch])
        # None: only tensors and plain values are read from a checkpoint, which is PyTorch's default.
        trainer.fit(classifier, batches, ckpt_path=None if checkpoint is None else str(checkpoint))
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    seconds = timer.time_elapsed("train") - timer.time_elapsed("validate")
    weights = trainer.strategy.lightning_module_state_dict()  # of all processes, where they are split
    unreadable, unreadable_val = (_everyones(found) for found in (watch.unreadable, watch.unreadable_val))
    if recipe.strategy == "fsdp" or processes.world_size > 1:
        network = create_model(recipe.model, len(source.classes), source.channels, **recipe.model_options)
        if processes.first:
            own = {name.removeprefix("network."): weight for name, weight in weights.items()}
            network.to(own[next(name for name, _ in network.named_parameters())].dtype)
            network.load_state_dict({name: own[name] for name in network.state_dict()})
    network = unsynchronised(network).eval()
    result = Result(
        model=recipe.model,
        top1=metrics["val_top1"],
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        flops=count_flops(network.cpu(), (1, source.channels, recipe.image_size, recipe.image_size)),
        seconds_per_epoch=seconds / recipe.epochs,
        epochs=recipe.epochs,
        train_images=len(source.train),
        val_images=len(source.val) - len(unreadable_val),
        skipped_images=source.skipped + len(unreadable | unreadable_val),
        top5=metrics["val_top5"],
        val_loss=metrics["val_loss"],
    )
    if processes.first:
        _write(recipe, network, source, result, out)
    return result


def prepare_folder(out: Path, overwrite: bool, resume: bool = False) -> None:
    """Make the output folder, and make sure now that it can be written.

    Raises:
        OutputError: it can't, or it holds something, and neither ``overwrite`` nor ``resume`` is on.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"out: can't write to {out}: {error.strerror}") from error
    if not (resume or overwrite) and any(not path.name.startswith(".") for path in out.iterdir()):
        raise OutputError(
            f"out: {out} is not empty; choose another folder, or pass --resume auto to go on with the run in it, "
            "or --overwrite to replace it"
        )


def _remove_run(out: Path) -> None:
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    for folder in ("checkpoints", "tensorboard"):
        shutil.rmtree(out / folder, ignore_errors=True)


def _check_same_run(out: Path, recipe: Recipe) -> None:
    """Make sure that what is to be continued was begun alike.

    Raises:
        OptionError: something that changes the result is another; the message names it and both values.
    """
    try:
        before = json.loads((out / "recipe.json").read_text())
    except FileNotFoundError:
        return
    except ValueError as error:
        raise OutputError(f"out: {out / 'recipe.json'} can't be read: {error}") from error
    now = json.loads(json.dumps(recipe.as_dict()))
    changed = [name for name in now if name not in FREE_TO_CHANGE and name in before and before[name] != now[name]]
    if changed:
        listed = "; ".join(f"{name}: {before[name]!r} then, {now[name]!r} now" for name in changed)
        raise OptionError(f"resume: expected the options that the run in {out} was begun with; {listed}")


def _trainer(
    recipe: Recipe, processes: Processes, out: Path, checkpoint: Path | None, callbacks: list[Callback]
) -> lightning.Trainer:
    files = WholeCheckpoints()
    steps = 0 if checkpoint is None else step_of(checkpoint)
    callbacks = [Progress(), FiniteLoss(out, recipe.log_steps), *callbacks]
    if recipe.ema_decay:
        callbacks.append(EMAWeightAveraging(decay=recipe.scaled_ema_decay))
    plugins: list[Any] = [files]
    if SLURMEnvironment.detect():
        # Lightning's way of going on under SLURM has checkpoints of its own; ours go on with --resume auto.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return make_trainer(
        recipe,
        processes,
        max_epochs=recipe.epochs,
        accumulate_grad_batches=recipe.accumulate,
        gradient_clip_val=recipe.clip_grad_norm or None,
        logger=open_logs(out, steps, recipe.tensorboard, processes.first),
        callbacks=[*callbacks, SaveAndStop(out, recipe.checkpoint_steps, checkpoint)],
        plugins=plugins,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )


def _everyones(found: set[str]) -> set[str]:
    """The union over all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return found
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, found)
    return set().union(*gathered)


def _write(recipe: Recipe, network: nn.Module, source: Source, result: Result, out: Path) -> None:
    """The weights, the picture, and last the result: a run that has it is finished."""
    facts = {"model": recipe.model, "model_options": recipe.model_options, "classes": source.classes}
    facts |= {"in_chans": source.channels, "image_size": recipe.image_size, "crop_pct": recipe.crop_pct}
    facts |= {"mean": source.mean, "std": source.std}
    try:
        save_weights(network, out / "model.safetensors", facts)
        _draw(recipe.model, result, out)
        write_whole(out / "result.json", (json.dumps(asdict(result), indent=2) + "\n").encode())
    except OSError as error:
        saved = checkpoints(out)
        raise OutputError(
            f"out: can't write to {out}: {error.strerror}; with room there, --resume auto finishes the run"
            + (f" from {saved[0].name}" if saved else "")
        ) from error


def _draw(model: str, result: Result, out: Path) -> None:
    try:
        from ..viz import plot_curves
    except ImportError as error:
        _tell(f"no curves.png: {error}")
        return
    title = f"{result.train_images:,} training and {result.val_images:,} validation images"
    picture = io.BytesIO()
    plot_curves({model: out / "metrics.csv"}, title).savefig(picture, dpi=130)
    write_whole(out / "curves.png", picture.getvalue())


def _tell(line: str) -> None:
    Console(stderr=True).print(line, highlight=False, soft_wrap=True, markup=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's notes on accelerators and worker counts; its progress bar and real warnings stay."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            # Lightning 2.6 with PyTorch 2.15, about the two of them alone.
            warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*", FutureWarning)
            warnings.filterwarnings("ignore", "Couldn't infer the batch indices.*")  # batches have the images' names
            warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
            yield
    finally:
        logger.setLevel(level)
