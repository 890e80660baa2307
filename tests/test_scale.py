"""The model of training on many GPUs: what has to hold whatever is assumed, and that its page is of this code."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks.scale import model, runs, tables
from benchmarks.scale.model import A100, ASSUMED, BATCH, CONVOLUTION, H100, MACHINES, SASA

GPUS = [2**power for power in range(11)]


@pytest.mark.parametrize(("name", "flops", "parameters"), [(SASA, 7.2, 18.0), (CONVOLUTION, 8.2, 25.6)])
def test_what_is_counted_is_the_papers(name, flops, parameters):
    own = model.network(name)
    assert own.run_flops == 3 * own.flops * 1_281_167 * 130
    assert own.flops / 1e9 == pytest.approx(flops, abs=0.1)
    assert own.parameters / 1e6 == pytest.approx(parameters, abs=0.05)
    assert own.norms == 53


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
@pytest.mark.parametrize("name", [SASA, CONVOLUTION])
@pytest.mark.parametrize("assumed", [one[2] for one in runs.CHANGES], ids=[one[0] for one in runs.CHANGES])
def test_efficiency_begins_at_one_and_falls(machine, name, assumed):
    strong = [runs.point(name, machine, gpus, BATCH, 1, assumed) for gpus in GPUS]
    synchronised = [runs.point(name, machine, gpus, BATCH, gpus, assumed) for gpus in GPUS]
    for found in (strong, synchronised):
        values = [one["efficiency"] for one in found]
        assert values[0] == pytest.approx(1)
        assert all(more < fewer for fewer, more in itertools.pairwise(values))
        assert values[-1] > 0
    assert all(one["efficiency"] <= own["efficiency"] for own, one in zip(strong, synchronised, strict=True))


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_a_batch_that_grows_scales_better(machine):
    grown = [runs.weak(machine, gpus)["efficiency"] for gpus in GPUS]
    fixed = [runs.point(SASA, machine, gpus, BATCH)["efficiency"] for gpus in GPUS]
    assert grown[0] == pytest.approx(1)
    assert all(more < fewer for fewer, more in itertools.pairwise(grown))
    assert all(one > other for one, other in zip(grown[6:], fixed[6:], strict=True))  # where fewer images are left


def test_one_gpu_alone_neither_sends_nor_waits():
    own = model.step(SASA, A100, 1, 256)
    assert (own.gradients, own.norms, own.stragglers) == (0, 0, 0)
    assert own.seconds == pytest.approx(own.compute + own.kernels + own.optimiser)
    assert model.all_reduce(1e9, A100, 1) == 0


def test_an_all_reduce_sends_at_most_twice_its_bytes():
    volumes = [model.ring_volume(members) for members in GPUS]
    assert volumes[:2] == [0, 1]
    assert volumes == sorted(volumes)
    assert volumes[-1] < 2
    assert volumes[-1] == pytest.approx(2, rel=2e-3)
    size = 1e15  # so that latency is nothing
    assert model.all_reduce(size, H100, 8) == pytest.approx(1.75 * size / (0.6 * 450e9), rel=1e-6)
    between = model.all_reduce(size, H100, 16) - model.all_reduce(size, H100, 8)
    assert between == pytest.approx(size / 8 / (0.9 * 50e9), rel=1e-6)
    sharded = replace(ASSUMED, volume=runs.FSDP)
    assert model.all_reduce(size, H100, 64, sharded) == pytest.approx(1.5 * model.all_reduce(size, H100, 64), rel=1e-4)


def test_the_last_bucket_is_not_hidden_and_a_short_backward_hides_less():
    size = 4 * model.network(SASA).parameters
    buckets = math.ceil(size / ASSUMED.bucket_bytes)
    bucket = model.all_reduce(size / buckets, H100, 1024)
    assert model.step(SASA, H100, 1024, 128).gradients == pytest.approx(bucket)
    whole = replace(ASSUMED, bucket_bytes=size)
    assert model.step(SASA, H100, 1024, 128, assumed=whole).gradients == pytest.approx(
        model.all_reduce(size, H100, 1024)
    )
    slow = replace(ASSUMED, nic_share=1e-3)
    exposed = [model.step(SASA, H100, 1024, images, assumed=slow).gradients for images in (4, 64)]
    assert exposed[0] > exposed[1] > model.all_reduce(size / buckets, H100, 1024, slow)


def test_the_slowest_of_many_is_waited_for():
    slowest = torch.randn(2000, 64).amax(1).mean().item()
    own = model.step(SASA, A100, 64, 64)
    bound = own.stragglers / ASSUMED.variation / (own.compute + own.kernels)
    assert slowest < bound < 1.3 * slowest


def test_more_images_than_fit_are_accumulated():
    once, twice = model.step(SASA, H100, 8, 256, 8), model.step(SASA, H100, 8, 512, 8)
    assert twice.kernels == 2 * once.kernels
    assert twice.norms == 2 * once.norms
    assert twice.gradients == once.gradients


def test_the_linear_rule_and_where_it_ends():
    assert model.learning_rate(256) == pytest.approx(0.1)
    assert model.learning_rate(BATCH) == 1.6
    assert [model.recipe(batch) for batch in (8192, 8193, 32769)] == [
        "linear rule",
        "LARS or LAMB",
        "not by these papers",
    ]


@pytest.mark.parametrize("gpus", [0, 12])
def test_gpus_that_fill_no_nodes_are_refused(gpus):
    with pytest.raises(ValueError, match=f"multiple of 8 expected, got {gpus}"):
        model.step(SASA, A100, gpus, 32)


def test_the_published_runs_are_within_reach():
    """A model that were off by half at a thousand GPUs would not be worth its page."""
    tuned = [one for one in (runs.check(*own) for own in runs.PUBLISHED) if "MLPerf" in one["where"]]
    assert all(0.75 < one["ratio"] < 1.05 for one in tuned)


def test_the_results_are_what_the_code_computes():
    assert json.loads(model.FILE.read_text()) == runs.run()


def test_page_and_picture_say_that_it_is_a_model():
    words = "model, not a measurement"
    assert words in (model.FILE.parent.parent.parent / "docs/scale.md").read_text().lower()
    assert words in json.loads(model.FILE.read_text())["what"]
    plot = pytest.importorskip("benchmarks.scale.plot")
    assert words in plot.figure(runs.run()).get_suptitle().lower()


def test_every_assumption_has_its_line():
    assert set(tables.ASSUMPTIONS) == set(json.loads(model.FILE.read_text())["assumptions"])
