"""Which image is in which batch."""

import random
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sasa.train import OptionError, Recipe
from sasa.train.data import ImageData
from sasa.train.order import PADDING, BatchOrder, seed_everything
from sasa.train.sources import open_source


def taken(order):
    return [[index for _, index in batch] for batch in order]


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9))
def test_processes_share_every_step_as_one_would_have_it(images, share, world_size, accumulate, seed):
    batch = share * world_size * accumulate
    if images < world_size * accumulate:
        return
    alone = BatchOrder(images, batch, accumulate=accumulate, shuffle=True, seed=seed)
    parts = [
        taken(BatchOrder(images, batch, rank, world_size, accumulate=accumulate, shuffle=True, seed=seed))
        for rank in range(world_size)
    ]
    joined = [list(chain(*shares)) for shares in zip(*parts, strict=True)]
    if images >= batch:
        assert joined == taken(alone)
    found = list(chain(*joined))
    assert len(found) == len(set(found)) and set(found) <= set(range(images))
    assert len(joined) % accumulate == 0


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 4))
def test_in_order_every_image_comes_once_and_all_have_equally_many(images, share, world_size):
    parts = [taken(BatchOrder(images, share * world_size, rank, world_size)) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    found = [index for part in parts for batch in part for index in batch]
    assert sorted(index for index in found if index != PADDING) == list(range(images))


@given(st.integers(0, 30))
def test_it_goes_on_anywhere(start):
    epochs = []
    for epoch in range(4):
        order = BatchOrder(23, 4, shuffle=True, seed=3)
        order.set_epoch(epoch)
        epochs.append(list(order))
    assert epochs[0] != epochs[1]
    epoch, done = divmod(start, 5)
    order = BatchOrder(23, 4, shuffle=True, seed=3, start=start)
    if epoch < 4:
        order.set_epoch(epoch)  # as Lightning does at every start of an epoch: the place within it is kept
        assert list(order) == epochs[epoch][done:]
        assert len(order) == 5


def test_draws_follow_from_the_numbers_alone():
    def drawn(*numbers, **options):
        seed_everything(*numbers, **options)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert drawn(1, 2) == drawn(1, 2) == drawn(1, 2, gpu=True)
    assert len({drawn(1, 2), drawn(2, 1), drawn(1, 2, 0), drawn(1)}) == 4


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({"batch_size": 10}, 4, r"batch_size: expected a multiple of 4 \(4 processes x accumulate 1\), got 10"),
        ({"batch_size": 8, "accumulate": 4}, 4, r"batch_size: expected a multiple of 16 \(4 processes x accumulate 4"),
        ({"augment": "imagenet"}, 1, r"augment: expected none or shift for small grey images in memory, got imagenet"),
    ],
)
def test_batches_that_can_not_be(changes, world_size, message):
    with pytest.raises(OptionError, match=message):
        ImageData(open_source(None), Recipe(**changes), 0, world_size)
