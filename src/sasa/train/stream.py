"""Batches from shards, split over processes and workers, that can go on anywhere in an epoch."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .batch import IGNORED, Taken, collate
from .images import UnreadableImage, read_image
from .order import IMAGE, seed_everything
from .shards import Sample, ShardImages
from .transforms import Transform


class ShardStream(IterableDataset):
    """Whole batches of this process's share of the shards.

    In training, every reader (a worker of a process) shuffles its shards anew each epoch and goes through them as often
    as its share of the epoch's steps takes, so that all processes have equally many. In validation every image comes
    once, and processes with fewer fill up with blanks that are labelled as ignored.

    Args:
        images: the shards.
        fit: brings an image to its size.
        vary: changes it at random; None: doesn't.
        classes: how many there are; labels beyond are unreadable.
        batch_size: images a step over all processes.
        accumulate: batches that a step is computed in.
        rank: this process, of ``world_size``.
        world_size: processes.
        seed: of the order and the draws.
        training: shuffle, and leave unreadable images out.
        strict: raise for them instead.
        blank: (C, S, S) bytes: what stands for an image that is not there.
    """

    def __init__(
        self,
        images: ShardImages,
        fit: Transform,
        vary: Transform | None,
        *,
        classes: int,
        batch_size: int,
        accumulate: int,
        rank: int,
        world_size: int,
        seed: int,
        training: bool,
        strict: bool,
        blank: Tensor,
    ) -> None:
        self.images, self.fit, self.vary = images, fit, vary
        self.share, self.rank, self.world_size = batch_size // accumulate // world_size, rank, world_size
        self.seed, self.training, self.strict, self.blank = seed, training, strict, blank
        self.classes, self.position = classes, 0
        if training:
            self.batches = max(1, len(images) // batch_size) * accumulate
        else:
            self.batches = max(-(-images.count(rank, world_size) // self.share) for rank in range(world_size))

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, unless within it already."""
        if self.position // self.batches != epoch:
            self.position = epoch * self.batches

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        workers, own = (worker.num_workers, worker.id) if worker else (1, 0)
        epoch, done = divmod(self.position, self.batches) if self.training else (0, 0)
        # The loader takes a batch of each worker in turn. Going on at batch `done`, the first worker is the one whose
        # turn that was, and has given its share of those before.
        own = (done + own) % workers
        before = len(range(own, done, workers))
        batches = len(range(own, self.batches, workers)) - before
        samples = self._training(epoch, own, workers) if self.training else self._validation(own, workers)
        taken = self._taken(islice(samples, before * self.share, None), epoch)
        return (collate(list(islice(taken, self.share))) for _ in range(batches))

    def _training(self, epoch: int, own: int, workers: int) -> Iterator[Sample]:
        """This reader's samples, without end."""
        number, readers = self.rank * workers + own, self.world_size * workers
        turn = 0
        while True:
            found = False
            for sample in self.images.samples(number, readers, (self.seed, epoch, turn)):
                found = True
                yield sample
            if not found:
                raise UnreadableImage(", ".join(self.images.shards), "no images for one of the readers")
            turn += 1

    def _validation(self, own: int, workers: int) -> Iterator[Sample]:
        """This worker's batches of the process's samples."""
        for place, sample in enumerate(self.images.samples(self.rank, self.world_size)):
            if place // self.share % workers == own:
                yield sample

    def _taken(self, samples: Iterator[Sample], epoch: int) -> Iterator[Taken]:
        """The samples decoded, without end: after the last come blanks."""
        ahead: deque[Sample] = deque()  # looked at already, to find one that can be read; their own turn comes later
        while sample := (ahead.popleft() if ahead else next(samples, None)):
            unreadable, image, tried = "", None, 0
            try:
                image = self._read(sample)
            except UnreadableImage as error:
                if self.strict:
                    raise
                unreadable = str(error)
            while image is None and self.training:
                if tried == len(ahead):
                    ahead.append(next(samples))
                with suppress(UnreadableImage):
                    sample, image = ahead[tried], self._read(ahead[tried])
                tried += 1
                if tried > len(self.images):
                    raise UnreadableImage("data", "not one of the images can be read")
            if image is None or sample.label is None:
                yield Taken(self.blank, IGNORED, sample.name, unreadable)
                continue
            image = self.fit(image)
            if self.vary is not None:
                seed_everything(IMAGE, self.seed, epoch, zlib.crc32(sample.name.encode(errors="surrogateescape")))
                image = self.vary(image)
            yield Taken(image, sample.label, sample.name, unreadable)
        while True:
            yield Taken(self.blank, IGNORED, "")

    def _read(self, sample: Sample) -> Any:
        if sample.label is None or not 0 <= sample.label < self.classes:
            raise UnreadableImage(sample.name, f"expected a label from 0 to {self.classes - 1}, got {sample.label}")
        return read_image(sample.image, sample.name)
