"""The model of training on many GPUs: what has to hold whatever is assumed, and that its page is of this code."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import scale
from benchmarks.scale import A100, ASSUMED, CHIPS, GPUS, H100, SASA, TWIN

PAGE = (Path(__file__).parent.parent / "docs/scale.md").read_text()


@pytest.mark.parametrize(("name", "flops", "parameters"), [(SASA, 7.2, 18.0), (TWIN, 8.2, 25.6)])
def test_what_is_counted_is_the_papers(name, flops, parameters):
    own = scale.counted(name)
    assert own.flops / 1e9 == pytest.approx(flops, abs=0.1)
    assert own.parameters / 1e6 == pytest.approx(parameters, abs=0.05)
    assert own.norms == 53


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"attention_share": 1.0},
        {"kernel_seconds": 20e-6},
        {"nic_share": 0.09},
        {"volume": 1.5},
        {"variation": 0.05},
    ],
)
def test_efficiency_begins_at_one_and_falls(chip, changed):
    assumed = replace(ASSUMED, **changed)
    strong = [scale.point(SASA, chip, gpus, assumed=assumed)["efficiency"] for gpus in GPUS]
    synchronised = [scale.point(SASA, chip, gpus, norm_group=gpus, assumed=assumed)["efficiency"] for gpus in GPUS]
    grown = [scale.point(SASA, chip, gpus, images=scale.IMAGES_A_GPU)["efficiency"] for gpus in GPUS]
    for values in (strong, synchronised, grown):
        assert values[0] == pytest.approx(1)
        assert all(0 < more < fewer for fewer, more in itertools.pairwise(values))
    assert all(one <= other for one, other in zip(synchronised, strong, strict=True))
    assert grown[-1] > strong[-1]  # where fewer images are left


def test_one_gpu_alone_neither_sends_nor_waits():
    own = scale.step(SASA, A100, 1, 256)
    assert (own.gradients, own.norms, own.stragglers) == (0, 0, 0)
    assert own.total == pytest.approx(own.compute + own.kernels + own.optimiser)
    assert scale.all_reduce(1e9, A100, 1) == 0


def test_an_all_reduce_sends_at_most_twice_its_bytes():
    volumes = [scale.ring_volume(members) for members in (1, 2, *GPUS[1:])]
    assert volumes == sorted(volumes)
    assert volumes[:2] == [0, 1] and volumes[-1] == pytest.approx(2, rel=2e-3)
    size = 1e15  # so that latency is nothing
    assert scale.all_reduce(size, H100, 8) == pytest.approx(1.75 * size / (0.6 * 450e9), rel=1e-6)
    between = scale.all_reduce(size, H100, 16) - scale.all_reduce(size, H100, 8)
    assert between == pytest.approx(size / 8 / (0.9 * 50e9), rel=1e-6)


def test_the_last_bucket_is_not_hidden_and_a_short_backward_hides_less():
    size = 4 * scale.counted(SASA).parameters
    bucket = scale.all_reduce(size / math.ceil(size / ASSUMED.bucket_bytes), H100, 1024)
    assert scale.step(SASA, H100, 1024, 128).gradients == pytest.approx(bucket)
    whole = replace(ASSUMED, bucket_bytes=size)
    exposed = scale.step(SASA, H100, 1024, 128, assumed=whole).gradients
    assert exposed == pytest.approx(scale.all_reduce(size, H100, 1024))
    slow = replace(ASSUMED, nic_share=1e-3)
    few, many = (scale.step(SASA, H100, 1024, images, assumed=slow).gradients for images in (4, 64))
    assert few > many > bucket


def test_the_slowest_of_many_is_waited_for():
    slowest = torch.randn(2000, 64).amax(1).mean().item()
    own = scale.step(SASA, A100, 64, 64)
    bound = own.stragglers / ASSUMED.variation / (own.compute + own.kernels)
    assert slowest < bound < 1.3 * slowest


def test_more_images_than_fit_are_accumulated():
    once, twice = scale.step(SASA, H100, 8, 256, 8), scale.step(SASA, H100, 8, 512, 8)
    assert (twice.kernels, twice.norms, twice.gradients) == (2 * once.kernels, 2 * once.norms, once.gradients)


@pytest.mark.parametrize("gpus", [0, 12])
def test_gpus_that_fill_no_nodes_are_refused(gpus):
    with pytest.raises(ValueError, match=f"multiple of 8, got {gpus}"):
        scale.step(SASA, A100, gpus, 32)


@pytest.mark.parametrize(
    ("changed", "efficiency"),
    [
        ({"attention_share": 1.0}, "8.7%"),
        ({}, "15%"),
        ({"kernel_seconds": 1e-6}, "37%"),
        ({"kernel_seconds": 20e-6}, "5.5%"),
        ({"nic_share": 0.09}, "13%"),
    ],
)
def test_the_page_states_what_would_change_the_picture(changed, efficiency):
    own = scale.point(SASA, H100, 1024, assumed=replace(ASSUMED, **changed))
    assert scale.efficiency(own) == efficiency
    assert efficiency in PAGE


def test_the_published_runs_are_within_reach():
    """A model that were off by half at a thousand GPUs would not be worth its page."""
    ratios = {where: [] for where, *_ in scale.PUBLISHED}
    for where, *own in scale.PUBLISHED:
        ratios[where].append(scale.published_ratio(*own))
    tuned = [one for where, own in ratios.items() if "MLPerf" in where for one in own]
    plain = ratios["PyTorch example, NVIDIA"]
    assert f"{min(tuned):.2f} to {max(tuned):.2f} of published MLPerf runs" in PAGE
    assert f"{min(plain):.2f} to {max(plain):.2f} times slower" in PAGE.replace("\n", " ")


def test_the_results_are_what_the_code_computes_and_say_that_it_is_a_model():
    found = json.loads(scale.FILE.read_text())
    assert found == scale.compute()
    assert "model, not a measurement" in found["what"] and "model, not a measurement" in PAGE.lower()
    pytest.importorskip("matplotlib")
    assert "model, not a measurement" in scale.figure(found).get_suptitle().lower()
