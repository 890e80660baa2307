"""Batches for training and validation: images read, augmented and put together, as a Lightning data module."""

from __future__ import annotations

import signal
import zlib
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import lightning
import torch
from timm.data.mixup import Mixup
from torch.utils.data import DataLoader, Dataset

from .batch import IGNORED, Batch, Candidate, Preparation, Taken, collate
from .errors import OptionError
from .launch import SIGNALS
from .order import MIXUP, PADDING, BatchOrder, seed_everything
from .recipe import Recipe
from .shards import ShardImages
from .sources import Images, Source, TensorImages
from .stream import ShardStream
from .transforms import ImageNetTransform, fit_transform, normalise, shift_transform


class LabelledImages(Dataset):
    """Takes images by (epoch, index).

    Args:
        images: to take from.
        preparation: of the images.
    """

    def __init__(self, images: Images, preparation: Preparation) -> None:
        if isinstance(images, TensorImages):  # fit all at once, now; later there is nothing to do for each
            images = TensorImages(preparation.fit(images.images), images.labels, images.part)
            preparation = replace(preparation, fit=_same)
        self.images, self.preparation = images, preparation

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: tuple[int, int] | int) -> Taken:
        epoch, index = (0, place) if isinstance(place, int) else place
        if index == PADDING:
            return Taken(self.preparation.blank, IGNORED, "")
        images, count = self.images, len(self.images)
        found = chain(range(index, count), range(index))
        candidates = (Candidate(images.name(i), images.label(i), index, partial(images.read, i)) for i in found)
        return self.preparation.take(candidates, epoch)


class ImageData(lightning.LightningDataModule):
    """Batches of a source's images, the same for every number of processes and workers.

    Args:
        source: the images.
        recipe: their size, augmentation and order.
        rank: this process, of ``world_size``.
        world_size: processes that share every batch.

    Raises:
        OptionError: batches that can't be shared out evenly, or an augmentation that these images can't have.
    """

    def __init__(self, source: Source, recipe: Recipe, rank: int = 0, world_size: int = 1) -> None:
        super().__init__()
        self.source, self.recipe, self.rank, self.world_size = source, recipe, rank, world_size
        shares = world_size * recipe.accumulate
        parts = f"{world_size} processes x accumulate {recipe.accumulate}"
        if recipe.batch_size % shares:
            raise OptionError(f"batch_size: expected a multiple of {shares} ({parts}), got {recipe.batch_size}")
        if len(source.train) < shares:
            raise OptionError(f"data: expected at least {shares} training images ({parts}), got {len(source.train)}")
        if recipe.mixup or recipe.cutmix:  # which pair the images of a process
            step = recipe.batch_size
            if not isinstance(source.train, ShardImages):
                step = min(step, len(source.train) // shares * shares)
            if step // shares % 2:
                raise OptionError(
                    f"batch_size: expected an even share of it with mixup or cutmix, got {step // shares} ({parts})"
                )
        size = recipe.image_size
        fit, vary = fit_transform(size, recipe.crop_pct), None
        train_fit = fit
        if recipe.augment == "shift":
            vary = shift_transform(size)
        elif recipe.augment == "imagenet":
            if isinstance(source.train, TensorImages):
                raise OptionError("augment: expected none or shift for small grey images in memory, got imagenet")
            train_fit, vary = _same, ImageNetTransform(size, recipe.auto_augment, source.mean)
        blank = torch.zeros(source.channels, size, size, dtype=torch.uint8)
        train_preparation = Preparation(train_fit, vary, blank, recipe.seed, training=True, strict=recipe.strict)
        self.train_set = self._set(source.train, train_preparation)
        self.val_set = self._set(source.val, Preparation(fit, None, blank, strict=recipe.strict))
        self.normalise = normalise(source.mean, source.std)
        self.mixup = None
        if recipe.mixup or recipe.cutmix:
            options = {"label_smoothing": recipe.label_smoothing, "num_classes": len(source.classes)}
            self.mixup = Mixup(recipe.mixup, recipe.cutmix, **options)

    def _set(self, images: Images | ShardImages, preparation: Preparation) -> Dataset:
        if not isinstance(images, ShardImages):
            return LabelledImages(images, preparation)
        recipe, classes = self.recipe, len(self.source.classes)
        shares = (recipe.batch_size, recipe.accumulate, self.rank, self.world_size)
        return ShardStream(images, preparation, classes, *shares)

    @property
    def steps_per_epoch(self) -> int:
        """Of the optimizer."""
        batches = len(self.train_set) if isinstance(self.train_set, ShardStream) else len(self._order(start=0))
        return batches // self.recipe.accumulate

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Bytes to normalised floats, for the whole batch at once, then mixup in training."""
        images, labels, names, unreadable = batch
        images = self.normalise(images)
        if self.recipe.precision == "64-true":
            images = images.double()
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.mixup is not None and self.trainer is not None and self.trainer.training:
            # What is drawn follows from the step and the batch, as everything does: see order.py.
            seed_everything(
                MIXUP,
                self.recipe.seed,
                self.trainer.global_step,
                zlib.crc32("".join(names).encode(errors="surrogateescape")),
            )
            images, labels = self.mixup(images, labels)
        return Batch(images, labels, names, unreadable)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches, from where training has got to on."""
        done = 0 if self.trainer is None else self.trainer.global_step * self.recipe.accumulate
        if isinstance(self.train_set, ShardStream):
            return self._stream_loader(self.train_set, done)
        return self._loader(self.train_set, self._order(start=done))

    def val_dataloader(self) -> DataLoader:
        """Batches in order, every image once."""
        if isinstance(self.val_set, ShardStream):
            return self._stream_loader(self.val_set, 0)
        images = len(self.val_set)  # type: ignore[arg-type]
        batch_size = self.recipe.batch_size // self.recipe.accumulate
        return self._loader(self.val_set, BatchOrder(images, batch_size, self.rank, self.world_size))

    def _order(self, start: int) -> BatchOrder:
        recipe = self.recipe
        options: dict[str, Any] = {"accumulate": recipe.accumulate, "seed": recipe.seed, "start": start}
        images = len(self.source.train)
        return BatchOrder(images, recipe.batch_size, self.rank, self.world_size, shuffle=True, **options)

    def _loader(self, dataset: Dataset, order: BatchOrder) -> DataLoader:
        workers = self.recipe.workers
        return ResumableLoader(
            dataset,
            batch_sampler=order,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
            worker_init_fn=_outlive_signals,
        )

    def _stream_loader(self, stream: ShardStream, start: int) -> DataLoader:
        stream.position = start
        return ResumableLoader(
            stream,
            batch_size=None,  # the stream makes batches, for it alone knows which worker has which
            num_workers=self.recipe.workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_outlive_signals,
        )


class ResumableLoader(DataLoader):
    """Tells Lightning that it can go on in the middle of an epoch: it starts from the step that training is at."""

    def __iter__(self) -> Any:
        """One epoch. Shards go on to the next by themselves: Lightning tells the epoch to samplers alone."""
        batches = super().__iter__()  # the workers have their copies of the stream now
        if isinstance(self.dataset, ShardStream):
            self.dataset.set_epoch(self.dataset.position // len(self.dataset) + 1)
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the place follows from the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


def _outlive_signals(worker: int) -> None:
    """Schedulers and Ctrl-C signal all processes: those that load images must live until the training one has saved."""
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _same(image: Any) -> Any:
    return image
