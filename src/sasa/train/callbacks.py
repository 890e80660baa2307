"""Callbacks around the training steps: checkpoints, signals, non-finite losses, speed."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor

from .._files import write_whole
from .batch import Batch
from .checkpoints import checkpoint_path, checkpoints, save_checkpoint
from .errors import NonFiniteLoss, OutputError, Stopped
from .launch import SIGNALS


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoint plugin, writing files as :func:`save_checkpoint` does."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        """Write ``checkpoint``."""
        save_checkpoint(checkpoint, Path(path))


ONE_PRESS = 2.0
"""Seconds within which SIGINT counts once: torchrun forwards a Ctrl-C that the terminal has already sent to all."""


class SaveAndStop(Checkpoint):
    """Writes checkpoints every ``every`` steps, before and after validation, and on a signal to stop.

    It does so only between two steps, or after an epoch, where Lightning's loops resume exactly. (Lightning's
    ModelCheckpoint saves neither on a signal nor one step before the end of an epoch, so that a run killed during a
    long validation loses only that step.) A second Ctrl-C doesn't wait for the step to finish.

    Args:
        out: the run's folder.
        every: steps between checkpoints.
        start: the checkpoint that this process resumes from.

    Raises:
        OutputError: the processes found different checkpoints to resume from.
    """

    def __init__(self, out: Path, every: int, start: Path | None = None) -> None:
        self.out, self.every, self.start = out, every, start
        self.signalled: signal.Signals | None = None
        self._interrupted = math.inf  # when SIGINT arrived
        self._first = False
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Handle signals, instead of Lightning's handlers.

        Lightning's start a collective operation inside the handler, in the middle of whatever the process is doing,
        which can deadlock the processes.
        """
        starts = trainer.strategy.broadcast(self.start)
        if starts != self.start:
            raise OutputError(f"out: expected all processes to see the same checkpoints, got {self.start} and {starts}")
        self._first = trainer.is_global_zero
        if threading.current_thread() is threading.main_thread():
            for number in (*SIGNALS, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as shells set it for background jobs
                    self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.signalled = self.signalled or signal.Signals(number)
        if number == signal.SIGINT:
            now = time.monotonic()
            if now > self._interrupted + ONE_PRESS:
                raise KeyboardInterrupt
            if self._first and self._interrupted == math.inf:
                # Not through rich, whose locks the interrupted code may hold.
                os.write(2, b"\nstopping: the step is finished and saved first; Ctrl-C again doesn't wait\n")
            self._interrupted = min(self._interrupted, now)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Save if a checkpoint is due, or if a process was signalled."""
        accumulate = trainer.accumulate_grad_batches
        if (batch_idx + 1) % accumulate:
            return
        left = (int(trainer.num_training_batches) - batch_idx - 1) // accumulate
        stop = self._asked_to_stop(trainer)
        if left and (stop or left == 1 or trainer.global_step % self.every == 0):
            self._save(trainer)
        if left and stop:
            self._stop(trainer)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop at once if signalled: there is a checkpoint from the last step but one."""
        if not trainer.sanity_checking and self.signalled and trainer.world_size == 1:
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Save after an epoch's validation; after the last one, the weights themselves are about to be written."""
        if trainer.current_epoch + 1 == trainer.max_epochs:
            return
        # The first process's progress bar has just reduced the epoch's metrics over all processes, which the others do
        # later; collective operations below must come after that in every process.
        _ = trainer.progress_bar_metrics
        self._save(trainer)
        if self._asked_to_stop(trainer):
            self._stop(trainer)

    def _asked_to_stop(self, trainer: lightning.Trainer) -> bool:
        """Whether any process was signalled. The answer must be the same in all, since they save together."""
        if trainer.world_size == 1:
            return self.signalled is not None
        asked = torch.tensor(float(self.signalled is not None), device=trainer.strategy.root_device)
        return bool(trainer.strategy.reduce(asked, reduce_op="sum") > 0)

    def _save(self, trainer: lightning.Trainer) -> None:
        trainer.save_checkpoint(checkpoint_path(self.out, trainer.global_step))

    def _stop(self, trainer: lightning.Trainer) -> None:
        saved = checkpoints(self.out)
        where = f"the last checkpoint is {saved[0]}; --resume auto continues" if saved else "there is no checkpoint"
        by = self.signalled.name if self.signalled else "a signal to another process"
        message = f"stopped by {by} after step {trainer.global_step}; {where}"
        raise Stopped(message, self.signalled or signal.SIGTERM)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Restore the signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}


class FiniteLoss(Callback):
    """Stops training when a loss is infinite or NaN.

    Losses stay on their device and are checked together every few steps and before each checkpoint is written, so that
    there is no GPU synchronisation at every step, and no checkpoint contains weights from after a bad step.

    Args:
        out: the run's folder, for the message.
        every: steps between checks.
    """

    def __init__(self, out: Path, every: int) -> None:
        self.out, self.every = out, every
        self._pending: list[tuple[Tensor, int, list[str]]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Record the loss."""
        self._pending.append((outputs["loss"].detach(), trainer.global_step, batch.names))
        if len(self._pending) >= self.every or trainer.strategy.root_device.type == "cpu":
            self.look()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Check the losses before anything is saved."""
        self.look()

    def look(self) -> None:
        """Raise for the first non-finite loss."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        losses = torch.stack([loss for loss, _, _ in pending]).tolist()
        for loss, (_, step, names) in zip(losses, pending, strict=True):
            if not math.isfinite(loss):
                saved = checkpoints(self.out)
                where = f"the last good checkpoint is {saved[0]}" if saved else "there is no checkpoint before it"
                listed = self.out / f"non-finite-step-{step}.txt"
                with contextlib.suppress(OSError):
                    write_whole(listed, ("\n".join(names) + "\n").encode(errors="surrogateescape"))
                few = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
                message = f"loss: expected a finite number, got {loss} at step {step}; {where}"
                raise NonFiniteLoss(f"{message}; the batch ({len(names)} images, in {listed}): {few}")


class Watch(Callback):
    """Logs images/s over all processes, share of time spent waiting for data, memory; warns of unreadable images.

    ``images_per_second``, ``data_wait`` (from 0 to 1), ``memory_gb`` (this process's peak: on the GPU if there is one),
    ``learning_rate``; every few steps.

    Args:
        every: steps between lines.
        batch_size: images per step, over all processes.
    """

    def __init__(self, every: int, batch_size: int) -> None:
        self.every, self.batch_size = every, batch_size
        self.unreadable: set[str] = set()
        self.unreadable_val: set[str] = set()
        self._since = self._ended = 0.0
        self._waited, self._steps = 0.0, 0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Don't count validation."""
        self._restart()

    def _restart(self) -> None:
        self._since = self._ended = time.perf_counter()
        self._waited, self._steps = 0.0, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        """The batch has arrived: stop the waiting clock."""
        self._waited += time.perf_counter() - self._ended
        self._note(batch, self.unreadable)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log if due."""
        self._ended = time.perf_counter()
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._steps += 1
        last = batch_idx + 1 == trainer.num_training_batches
        if trainer.global_step % self.every and not last:
            return
        seconds = max(self._ended - self._since, 1e-9)
        figures = {
            "images_per_second": self._steps * self.batch_size / seconds,
            "data_wait": self._waited / seconds,
            "memory_gb": _memory(trainer.strategy.root_device) / 1e9,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
        }
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step - 1)
        self._restart()

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check for images that could not be read."""
        self._note(batch, self.unreadable_val)

    def _note(self, batch: Batch, found: set[str]) -> None:
        for reason in filter(None, batch.unreadable):
            if reason not in found:
                found.add(reason)
                warnings.warn(f"skipped an image that can't be read: {reason}", stacklevel=2)


def _memory(device: torch.device) -> float:
    """This process's peak memory in bytes: on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # kilobytes, on Linux
