"""Which image is in which batch: a pure function of the seed and the step, so that no state has to be saved.

A resumed run, or one on a different number of processes, uses the same images in the same order with the same random
draws: the order of an epoch comes from (seed, epoch), the draws of an image's augmentation from (seed, epoch, index),
those of a step (mixup, dropout) from (seed, step, process).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

IMAGE, STEP, MIXUP = range(1, 4)  # purposes of draws; the first number of their seeds, so that no two coincide
PADDING = -1  # index of an empty slot in the last batch


def seed_everything(*numbers: int, gpu: bool = False) -> None:
    """Set Python's, NumPy's and PyTorch's random generators to a state determined by ``numbers`` alone.

    ``gpu`` includes the accelerators' generators, which takes a hundred times as long as the others.
    """
    first, second, third = (int(n) for n in np.random.SeedSequence((len(numbers), *numbers)).generate_state(3))
    random.seed(first)
    np.random.seed(second)
    torch.default_generator.manual_seed(third)
    if gpu:
        torch.manual_seed(third)


class BatchOrder(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index), this process's share of each.

    When shuffled, every step is complete: images left over at the end of an epoch are left out of it. In order, the
    last batch is filled up with :data:`PADDING`, so that every process has the same number.

    Args:
        images: number of images.
        batch_size: images per step over all processes; a multiple of ``world_size * accumulate``.
        accumulate: number of batches that a step is computed in.
        rank: this process, of ``world_size``.
        world_size: processes.
        shuffle: a new order each epoch; otherwise the given order.
        seed: of the order.
        start: batches already completed, over all epochs.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        accumulate: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        start: int = 0,
    ) -> None:
        self.images, self.rank, self.world_size = images, rank, world_size
        self.shuffle, self.seed, self.position = shuffle, seed, start
        # If there are fewer images than a step takes, they form one step, as large as can be divided evenly.
        step = batch_size if images >= batch_size or not shuffle else images - images % (world_size * accumulate)
        self.batch_size, self.share = step // accumulate, step // accumulate // world_size
        self.batches = images // step * accumulate if shuffle else -(-images // self.batch_size)

    @property
    def sampler(self) -> BatchOrder:
        """Where Lightning looks for :meth:`set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch, unless within it already."""
        if self.position // len(self) != epoch:
            self.position = epoch * len(self)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, first = divmod(self.position, len(self))
        order = np.arange(self.images)
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.images)
        for batch in range(first, len(self)):
            begin = batch * self.batch_size + self.rank * self.share
            own = order[begin : begin + self.share].tolist()
            yield [(epoch, index) for index in own + [PADDING] * (self.share - len(own))]
