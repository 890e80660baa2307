"""Batches for training and validation: images read, augmented and collated, as a Lightning data module."""

from __future__ import annotations

import signal
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning
import torch
from timm.data.mixup import Mixup
from torch.utils.data import DataLoader

from .batch import Batch, LabelledImages, Taken, collate
from .errors import OptionError
from .launch import SIGNALS
from .order import MIXUP, BatchOrder, seed_everything
from .recipe import Recipe
from .sources import Source, TensorImages
from .transforms import ImageNetTransform, fit_transform, normalise, shift_transform


class ImageData(lightning.LightningDataModule):
    """Batches of a source's images, identical for any number of processes and workers.

    Args:
        source: the images.
        recipe: their size, augmentation and order.
        rank: this process, of ``world_size``.
        world_size: processes that share every batch.

    Raises:
        OptionError: batches can't be divided evenly, or the augmentation doesn't support these images.
    """

    collate: Callable[[list[Taken]], Any] = staticmethod(collate)

    def __init__(self, source: Source, recipe: Recipe, rank: int = 0, world_size: int = 1) -> None:
        super().__init__()
        self.source, self.recipe, self.rank, self.world_size = source, recipe, rank, world_size
        shares = world_size * recipe.accumulate
        parts = f"{world_size} processes x accumulate {recipe.accumulate}"
        if recipe.batch_size % shares:
            raise OptionError(f"batch_size: expected a multiple of {shares} ({parts}), got {recipe.batch_size}")
        if len(source.train) < shares:
            raise OptionError(f"data: expected at least {shares} training images ({parts}), got {len(source.train)}")
        if recipe.mixup or recipe.cutmix:  # which pair images within a process
            step = min(recipe.batch_size, len(source.train) // shares * shares)
            if step // shares % 2:
                raise OptionError(
                    f"batch_size: expected an even share of it with mixup or cutmix, got {step // shares} ({parts})"
                )
        self._open()

    def _open(self) -> None:
        """Create the two data sets and the transforms of whole batches."""
        source, recipe = self.source, self.recipe
        size, train, val = recipe.image_size, source.train, source.val
        fit, train_fit, vary = fit_transform(size, recipe.crop_pct), None, None
        if recipe.augment == "imagenet":
            if isinstance(train, TensorImages):
                raise OptionError("augment: expected none or shift for small grey images in memory, got imagenet")
            vary = ImageNetTransform(size, recipe.auto_augment, source.mean)
        else:
            train_fit = fit
            vary = shift_transform(size) if recipe.augment == "shift" else None
        if isinstance(train, TensorImages) and isinstance(val, TensorImages):  # resized at once, not one by one
            train, val = (replace(part, images=fit(part.images)) for part in (train, val))
            fit = train_fit = None
        blank = torch.zeros(source.channels, size, size, dtype=torch.uint8)
        options: dict[str, Any] = {"seed": recipe.seed, "training": True, "strict": recipe.strict}
        self.train_set = LabelledImages(train, train_fit, vary, blank, **options)
        self.val_set = LabelledImages(val, fit, None, blank, strict=recipe.strict)
        self.normalise = normalise(source.mean, source.std)
        self.mixup = None
        if recipe.mixup or recipe.cutmix:
            smoothing, classes = recipe.label_smoothing, len(source.classes)
            self.mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=smoothing, num_classes=classes)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps."""
        return len(self._order(start=0)) // self.recipe.accumulate

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Bytes to normalised floats, for the whole batch at once, then mixup in training."""
        images, labels, names, unreadable = batch
        images = self.normalise(images)
        if self.recipe.precision == "64-true":
            images = images.double()
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.mixup is not None and self.trainer is not None and self.trainer.training:
            # Random draws are determined by the step and the batch, as everywhere: see order.py.
            seed_everything(
                MIXUP,
                self.recipe.seed,
                self.trainer.global_step,
                zlib.crc32("".join(names).encode(errors="surrogateescape")),
            )
            images, labels = self.mixup(images, labels)
        return Batch(images, labels, names, unreadable)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches, from the current step of the training."""
        done = 0 if self.trainer is None else self.trainer.global_step * self.recipe.accumulate
        return self._loader(self.train_set, self._order(start=done))

    def val_dataloader(self) -> DataLoader:
        """Batches in order, every image once."""
        batch_size = self.recipe.batch_size // self.recipe.accumulate
        return self._loader(self.val_set, BatchOrder(len(self.val_set), batch_size, self.rank, self.world_size))

    def _order(self, start: int) -> BatchOrder:
        recipe = self.recipe
        shares = (len(self.train_set), recipe.batch_size, self.rank, self.world_size)
        return BatchOrder(*shares, accumulate=recipe.accumulate, shuffle=True, seed=recipe.seed, start=start)

    def _loader(self, dataset: LabelledImages, order: BatchOrder) -> DataLoader:
        workers = self.recipe.workers
        return ResumableLoader(
            dataset,
            batch_sampler=order,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=self.collate,
            worker_init_fn=_outlive_signals,
        )


class ResumableLoader(DataLoader):
    """A loader that Lightning can resume in the middle of an epoch: it starts from the current training step."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save: the position is determined by the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


def _outlive_signals(worker: int) -> None:
    """Schedulers and Ctrl-C signal all processes: data-loading workers must survive until the trainer has saved."""
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
