"""Two processes against one: the same batches, the same steps, the same metrics."""

import json
import os
import signal

import pytest
import torch
from processes import Running, recipe, together, weights

from sasa.train.fit import train

# Fifty steps, in float64: what differs is the order of sums.
FIFTY = {"epochs": 10, "batch_size": 12, "precision": "64-true", "optimizer": "sgd", "learning_rate": 0.05}
FIFTY |= {"log_steps": 1, "checkpoint_steps": 100}


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    Running(out.parent / "log", train, recipe(data, **FIFTY), out).succeed()
    return out


def result(out):
    return json.loads((out / "result.json").read_text())


def assert_close(first, second, rtol):
    a, b = weights(first), weights(second)
    for name in a:
        torch.testing.assert_close(
            a[name].double(), b[name].double(), rtol=rtol, atol=rtol, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_two_processes_are_one_to_rounding_over_fifty_steps(data, alone, tmp_path):
    for running in together(tmp_path / "log", 2, train, recipe(data, **FIFTY), tmp_path / "run"):
        running.succeed()
    assert_close(alone, tmp_path / "run", rtol=1e-9)
    one, two = result(alone), result(tmp_path / "run")
    assert (one["top1"], one["top5"], one["val_images"]) == (two["top1"], two["top5"], two["val_images"])
    assert one["val_loss"] == pytest.approx(two["val_loss"], rel=1e-6)


def test_a_group_of_one_is_one_process(data, tmp_path):
    few = FIFTY | {"epochs": 2}
    Running(tmp_path / "log", train, recipe(data, **few), tmp_path / "alone").succeed()
    Running(tmp_path / "log", train, recipe(data, strategy="ddp", **few), tmp_path / "run").succeed()
    assert_close(tmp_path / "alone", tmp_path / "run", rtol=1e-12)


def test_split_weights_are_whole_ones_to_rounding_and_go_on_from_a_checkpoint(data, tmp_path):
    """FSDP in float32, which is all it has, against one process in float64; stopped once between."""
    few = FIFTY | {"epochs": 2, "learning_rate": 1e-3}  # in float32 rounding grows fast
    alone = tmp_path / "alone"
    Running(tmp_path / "alone.log", train, recipe(data, **few), alone).succeed()
    options = recipe(data, strategy="fsdp", **(few | {"precision": "32-true", "checkpoint_steps": 3}))
    pair = together(tmp_path / "log", 2, stopping_after, 7, options, tmp_path / "run")
    assert [running.end() for running in pair] == [143, 143]
    for running in together(tmp_path / "log", 2, train, options, tmp_path / "run", resume="auto"):
        assert "going on after step" in running.succeed() or running is not pair[0]
    assert_close(alone, tmp_path / "run", rtol=1e-4)
    assert result(alone)["val_loss"] == pytest.approx(result(tmp_path / "run")["val_loss"], rel=1e-3)


def stopping_after(step, *arguments, **options):
    """Train, and be sent SIGTERM at that step in the second process."""
    from sasa.train.callbacks import Watch

    note = Watch.on_train_batch_end

    def signalled(self, trainer, *rest):
        note(self, trainer, *rest)
        if trainer.global_step == step and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    Watch.on_train_batch_end = signalled
    train(*arguments, **options)
