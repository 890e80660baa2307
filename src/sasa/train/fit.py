"""Training: from a recipe to checkpoints, logs, weights and a result."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, RichProgressBar, Timer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from rich.console import Console
from torch import nn

from .._files import write_whole
from ..models import count_flops
from .callbacks import CheckpointFiles, FiniteLoss, SaveAndStop, Watch
from .checkpoints import alone_in, checkpoints, step_of
from .data import ImageData
from .errors import OptionError, OutputError
from .folder import (
    CHECKSUM,
    DATA,
    RECIPE,
    RESULT,
    WEIGHTS,
    Result,
    check_folder,
    check_same_recipe,
    checkpoint_to_resume,
    finished_run,
    prepare_folder,
    remove_run,
    write_json,
)
from .launch import Processes, find_processes, make_trainer, restarts
from .logs import RunLog
from .order import seed_everything
from .recipe import Recipe, Resume
from .task import build_network, task_of
from .weights import save_weights


def train(
    recipe: Recipe, out: Path = Path("runs/train"), *, resume: Resume = "never", overwrite: bool = False
) -> Result:
    """Train a network on images and write its weights, log and result.

    Writes to ``out``: ``checkpoints/`` (the last three), ``metrics.csv``, TensorBoard's files,
    ``model.safetensors`` (weights, with the metadata needed to use them; its checksum beside), ``curves.png``,
    ``recipe.json``, ``data.json`` (the classes' names) and, at the very end, ``result.json``.

    Args:
        recipe: the network, the images and how it is trained.
        out: folder to write to.
        resume: auto resumes the run in ``out`` from its newest intact checkpoint, or starts one; a finished run is left
            unchanged. never rejects a folder that isn't empty.
        overwrite: replace an earlier run in ``out``.

    Raises:
        DataError: data can't be used for training.
        OutputError: out can't be written, or contains a run and overwrite is off.
        OptionError: an option is out of range, or differs from that of the run to be resumed.
        NonFiniteLoss: the loss is not finite.
        Stopped: a signal requested a stop; the checkpoint is written.
    """
    recipe.check()
    if resume not in ("never", "auto"):
        raise OptionError(f"resume: expected never or auto, got {resume!r}")
    if resume == "auto" and overwrite:
        raise OptionError("overwrite: expected it without resume auto, which keeps the earlier run; got both")
    processes = find_processes(recipe)
    if restarts():  # torchrun has restarted all processes because one failed
        resume, overwrite = "auto", False
    if processes.first:
        check_folder(out, overwrite, resume == "auto")
    tell: Callable[[str], None] = _tell if processes.first else lambda line: None
    finished = finished_run(out, tell, task_of(recipe.model).result) if resume == "auto" else None
    if finished is not None:
        check_same_recipe(out, recipe)
        return finished
    # All errors in the options and images are found before the folder is touched.
    task = task_of(recipe.model)
    source = task.open(recipe.data, recipe.strict)
    seed_everything(recipe.seed)
    network = build_network(recipe, source)
    batches = task.data(source, recipe, processes.rank, processes.world_size)
    if processes.first:
        prepare_folder(out, overwrite, resume == "auto")
    with alone_in(out) if processes.first else contextlib.nullcontext():
        # Other processes don't look for files that the first may be about to remove.
        checkpoint = checkpoint_to_resume(out, recipe, _described(source), tell) if resume == "auto" else None
        return fit(recipe, network, source, out, checkpoint, processes, batches, overwrite=overwrite)


def fit(
    recipe: Recipe,
    network: nn.Module,
    source: Any,
    out: Path,
    checkpoint: Path | None = None,
    processes: Processes | None = None,
    batches: ImageData | None = None,
    *,
    overwrite: bool = False,
) -> Result:
    """Train ``network`` on ``source``, resuming from ``checkpoint`` if given, and write the files of :func:`train`.

    ``overwrite`` removes those of an earlier run.
    """
    processes = processes or find_processes(recipe)
    task = task_of(recipe.model)
    batches = batches or task.data(source, recipe, processes.rank, processes.world_size)
    log = RunLog(out, 0 if checkpoint is None else step_of(checkpoint), recipe.tensorboard)
    if processes.first:
        try:
            if overwrite:
                remove_run(out)
            write_json(out / RECIPE, recipe.as_dict())
            write_json(out / DATA, _described(source))
            log.begin()
        except OSError as error:
            raise OutputError(f"out: can't write to {out}: {error.strerror}") from error
    trained = copy.deepcopy(network)  # receives the weights at the end: neither sharded nor synchronised
    if recipe.channels_last:
        network = network.to(memory_format=torch.channels_last)
    if processes.world_size > 1 and recipe.sync_batchnorm:
        network = _synchronised(network, processes)
    if recipe.compile:
        network.compile()
    module = task.module(network, source, recipe, batches.steps_per_epoch * recipe.epochs)
    timer, watch = Timer(), Watch(recipe.log_steps, recipe.batch_size)
    with quiet():
        callbacks = [timer, watch, SaveAndStop(out, recipe.checkpoint_steps, checkpoint)]
        trainer = _trainer(recipe, processes, log, [FiniteLoss(out, recipe.log_steps), *callbacks])
        resumed = None if checkpoint is None else str(checkpoint)
        trainer.fit(module, batches, ckpt_path=resumed, weights_only=True)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    seconds = timer.time_elapsed("train") - timer.time_elapsed("validate")
    weights = trainer.strategy.lightning_module_state_dict()  # from all processes, if they are sharded
    unreadable, unreadable_val = (everyones(found) for found in (watch.unreadable, watch.unreadable_val))
    if processes.first:
        own = {name.removeprefix("network."): weight.cpu() for name, weight in weights.items()}
        trained.load_state_dict({name: own[name] for name in trained.state_dict()}, assign=True)
    result = task.result(
        model=recipe.model,
        parameters=sum(parameter.numel() for parameter in trained.parameters()),
        flops=count_flops(trained.eval(), (1, source.channels, recipe.image_size, recipe.image_size)),
        seconds_per_epoch=seconds / recipe.epochs,
        epochs=recipe.epochs,
        train_images=len(source.train),
        val_images=len(source.val) - len(unreadable_val),
        skipped_images=source.skipped + len(unreadable | unreadable_val),
        **task.figures(metrics),
    )
    if processes.first:
        _write(recipe, trained, source, result, out)
    return result


def _synchronised(network: nn.Module, processes: Processes) -> nn.Module:
    """The network with PyTorch's synchronised batch norms, which work on GPUs."""
    if processes.accelerator in ("gpu", "cuda"):
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if processes.first and any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        _tell("sync_batchnorm: only GPUs synchronise; each process normalises over its own images of a batch")
    return network


def _described(source: Any) -> dict[str, Any]:
    """Everything that must be unchanged when a run is resumed."""
    return {"classes": list(source.classes), "channels": source.channels}


def _trainer(recipe: Recipe, processes: Processes, log: RunLog, callbacks: list[Callback]) -> lightning.Trainer:
    callbacks = [RichProgressBar(), *callbacks]
    if recipe.ema_decay:
        callbacks.append(EMAWeightAveraging(decay=recipe.scaled_ema_decay))
    plugins: list[Any] = [CheckpointFiles()]
    if processes.launcher == "slurm":
        # Lightning's resuming under SLURM uses its own checkpoints; ours are resumed with --resume auto.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return make_trainer(
        recipe,
        processes,
        max_epochs=recipe.epochs,
        check_val_every_n_epoch=recipe.epochs if recipe.validate == "last_epoch" else 1,
        accumulate_grad_batches=recipe.accumulate,
        gradient_clip_val=recipe.clip_grad_norm or None,
        logger=log,
        callbacks=callbacks,
        plugins=plugins,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )


def everyones(found: set[str]) -> set[str]:
    """The union over all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return found
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, found)
    return set().union(*gathered)


def _write(recipe: Recipe, network: nn.Module, source: Any, result: Result, out: Path) -> None:
    """Write the weights, the figure, and last the result, which marks a run as finished."""
    task = task_of(recipe.model)
    try:
        save_weights(network, out / WEIGHTS, task.facts(recipe, source))
        with (out / WEIGHTS).open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        write_whole(out / CHECKSUM, f"{checksum}  {WEIGHTS}\n".encode())
        _draw(recipe.model, result, out, task.curve)
        write_json(out / RESULT, asdict(result))
    except OSError as error:
        saved = checkpoints(out)
        raise OutputError(
            f"out: can't write to {out}: {error.strerror}; with room there, --resume auto finishes the run"
            + (f" from {saved[0].name}" if saved else "")
        ) from error


def _draw(model: str, result: Result, out: Path, curve: tuple[str, str]) -> None:
    try:
        from ..viz import plot_curves
    except ImportError as error:
        _tell(f"no curves.png: {error}")
        return
    title = f"{result.train_images:,} training and {result.val_images:,} validation images"
    picture = io.BytesIO()
    plot_curves({model: out / "metrics.csv"}, title, *curve).savefig(picture, dpi=130)
    write_whole(out / "curves.png", picture.getvalue())


def _tell(line: str) -> None:
    Console(stderr=True).print(line, highlight=False, soft_wrap=True, markup=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's notes on accelerators and worker counts; its progress bar and real warnings remain."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            # Lightning 2.6 with PyTorch 2.15, concerning only those two.
            warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*", FutureWarning)
            warnings.filterwarnings("ignore", "Couldn't infer the batch indices.*")  # batches contain the images' names
            warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
            yield
    finally:
        logger.setLevel(level)
