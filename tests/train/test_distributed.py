"""Two processes against one: the same batches, the same steps, the same metrics."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from processes import SMALL, Running, recipe, together, weights
from torch import nn

from sasa import RelativeSelfAttention
from sasa.models import create_model
from sasa.train import fit, task
from sasa.train.fit import train
from sasa.train.module import blocks

# Fifty steps, in float64: what differs is the order of sums.
FIFTY = {"epochs": 10, "batch_size": 12, "precision": "64-true", "optimizer": "sgd", "learning_rate": 0.05}
FIFTY |= {"log_steps": 1, "checkpoint_steps": 100}


def network(name, classes, channels, **options):
    """Without batch norms, which only GPUs synchronise."""
    block = [nn.Sequential(nn.GroupNorm(4, 16), RelativeSelfAttention(16, 16, 3, 4), nn.GELU()) for _ in range(2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes)]
    return nn.Sequential(nn.Conv2d(channels, 16, 3, 2), nn.Sequential(*block), *head)


def train_it(*arguments, **options):
    task.create_model = network
    fit.train(*arguments, **options)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    Running(out.parent / "log", train_it, recipe(data, **FIFTY), out).succeed()
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
    for running in together(tmp_path / "log", 2, train_it, recipe(data, **FIFTY), tmp_path / "run"):
        running.succeed()
    assert_close(alone, tmp_path / "run", rtol=1e-9)
    one, two = result(alone), result(tmp_path / "run")
    assert (one["top1"], one["top5"], one["val_images"]) == (two["top1"], two["top5"], two["val_images"])
    assert one["val_loss"] == pytest.approx(two["val_loss"], rel=1e-6)


@pytest.mark.nightly
def test_a_group_of_one_is_one_process(data, tmp_path):
    few = FIFTY | {"epochs": 2}
    Running(tmp_path / "log", train, recipe(data, **few), tmp_path / "alone").succeed()
    Running(tmp_path / "log", train, recipe(data, strategy="ddp", **few), tmp_path / "run").succeed()
    assert_close(tmp_path / "alone", tmp_path / "run", rtol=1e-12)


def test_split_weights_are_whole_ones_to_rounding_and_go_on_from_a_checkpoint(data, tmp_path):
    """FSDP in float32, which is all it has, against one process in float64; stopped once between."""
    few = FIFTY | {"epochs": 2, "learning_rate": 1e-3}  # in float32 rounding grows fast
    alone = tmp_path / "alone"
    Running(tmp_path / "alone.log", train_it, recipe(data, **few), alone).succeed()
    options = recipe(data, strategy="fsdp", **(few | {"precision": "32-true", "checkpoint_steps": 3}))
    pair = together(tmp_path / "log", 2, stopping_after, 7, options, tmp_path / "run")
    assert [running.end() for running in pair] == [143, 143]
    for running in together(tmp_path / "log", 2, train_it, options, tmp_path / "run", resume="auto"):
        assert "resuming after step" in running.succeed() or running is not pair[0]
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
    train_it(*arguments, **options)


@pytest.mark.parametrize(("name", "count"), [("sasa_resnet14", 4), ("sasa_resnet26", 8)])
def test_networks_are_split_by_residual_blocks(name, count):
    parts = blocks(create_model(name))
    assert sum(type(part).__name__ == "Bottleneck" for part in parts) == count
    shares = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
    assert sum(shares) > 0.6 * sum(parameter.numel() for parameter in create_model(name).parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_on_one_machine_sockets_listen_on_the_loopback_interface_alone(data, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), "train", "--data", str(data), "--out", str(tmp_path / "run")]
    for name, value in (SMALL | {"epochs": 1, "devices": 2}).items():
        if name not in ("model_options", "tensorboard"):
            command += [f"--{name}", str(value)]
    environment = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    environment |= {"OMP_NUM_THREADS": "1", "LISTENING": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sync_batchnorm: only GPUs synchronise" in done.stderr
    found = [json.loads((tmp_path / f"listening-{rank}").read_text()) for rank in range(2)]
    assert all(found) and {address for one in found for address in one} == {"0100007F"}  # 127.0.0.1


PROGRAM = """
import json, os, sys
from pathlib import Path
from sasa.cli import main
from sasa.train.callbacks import Watch

begin = Watch.on_train_batch_start

def noted(self, trainer, *rest):
    begin(self, trainer, *rest)
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    own = {os.readlink(link) for link in links if os.path.islink(link)}
    tables = [Path(f"/proc/self/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [row.split() for table in tables for row in table]
    listening = [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]
    Path(os.environ["LISTENING"], f"listening-{trainer.global_rank}").write_text(json.dumps(listening))

Watch.on_train_batch_start = noted
sys.exit(main())
"""
