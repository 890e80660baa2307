"""Batches from shards, split over processes and workers, that can start anywhere in an epoch."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from .batch import IGNORED, Candidate, Preparation, Taken, collate
from .images import UnreadableImage, read_image
from .shards import Sample, ShardImages


class ShardStream(IterableDataset):
    """Whole batches of this process's share of the shards.

    In training, every reader (a worker of a process) shuffles its shards anew each epoch and goes through them as often
    as its share of the epoch's steps takes, so that all processes have equally many. In validation every image comes
    once, and processes with fewer fill up with blanks that are labelled as ignored.

    Args:
        images: the shards.
        preparation: of the images.
        classes: how many there are; labels beyond are unreadable.
        batch_size: images a step over all processes.
        accumulate: batches that a step is computed in.
        rank: this process, of ``world_size``.
        world_size: processes.
    """

    def __init__(
        self,
        images: ShardImages,
        preparation: Preparation,
        classes: int,
        batch_size: int,
        accumulate: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.images, self.preparation, self.classes = images, preparation, classes
        self.share, self.rank, self.world_size = batch_size // accumulate // world_size, rank, world_size
        self.training, self.position = preparation.training, 0
        if self.training:
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
        # The loader takes a batch of each worker in turn. Starting at batch `done`, the first worker is the one whose
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
            for sample in self.images.samples(number, readers, (self.preparation.seed, epoch, turn)):
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
        ahead: deque[Sample] = (
            deque()
        )  # tried already in the place of one that can't be read; their own turn comes later

        def candidates(first: Sample) -> Iterator[Candidate]:
            yield self._candidate(first)
            for place in range(len(self.images)):
                if place == len(ahead):
                    ahead.append(next(samples))
                yield self._candidate(ahead[place])

        while sample := (ahead.popleft() if ahead else next(samples, None)):
            yield self.preparation.take(candidates(sample), epoch)
        while True:
            yield Taken(self.preparation.blank, IGNORED, "")

    def _candidate(self, sample: Sample) -> Candidate:
        def read() -> Any:
            if sample.label is None or not 0 <= sample.label < self.classes:
                raise UnreadableImage(sample.name, f"expected a label from 0 to {self.classes - 1}, got {sample.label}")
            return read_image(sample.image, sample.name)

        number = zlib.crc32(sample.name.encode(errors="surrogateescape"))
        return Candidate(sample.name, sample.label or 0, number, read)
