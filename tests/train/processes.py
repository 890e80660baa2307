"""Trainings in processes of their own, which can be killed. One server process imports everything once and forks."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_files import write_idx
from safetensors.torch import load_file

from sasa.train import Recipe

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["sasa.train.command", "sasa.viz"])

SMALL: dict[str, Any] = {
    "model": "sasa_resnet14",
    "model_options": {"width": 0.5},
    "image_size": 10,
    "epochs": 3,
    "batch_size": 8,
    "warmup_epochs": 1,
    "checkpoint_steps": 3,
    "log_steps": 2,
    "tensorboard": False,
    "devices": 1,
}


def small_images(folder: Path, train: int = 64, val: int = 19, size: int = 10) -> Path:
    """IDX files of three classes that differ in brightness."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", val)):
        labels = np.arange(count) % 3
        pixels = rng.integers(0, 100, (count, size, size)) + 60 * labels[:, None, None]
        write_idx(folder / f"{part}-images-idx3-ubyte", torch.from_numpy(pixels.astype(np.uint8)))
        write_idx(folder / f"{part}-labels-idx1-ubyte", torch.from_numpy(labels.astype(np.uint8)))
    return folder


def recipe(data: Path, **changes: Any) -> Recipe:
    """A training of a second."""
    return Recipe(**(SMALL | {"data": data} | changes))


def _main(log: str, environment: dict[str, str], target: Callable, arguments: tuple, options: dict) -> None:
    os.environ.update(environment)
    os.setsid()
    file = Path(log).open("a")  # noqa: SIM115
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    # Not the server's own way, which this process has inherited: its workers would import everything again.
    multiprocessing.set_start_method("fork", force=True)
    try:
        target(*arguments, **options)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        file.flush()
        os._exit(1)


class Running:
    """A process that runs ``target``; what it prints is in ``log``."""

    def __init__(self, log: Path, target: Callable, *arguments: Any, environment: dict | None = None, **options: Any):
        self.log = log
        self.process = CONTEXT.Process(target=_main, args=(str(log), environment or {}, target, arguments, options))
        self.process.start()

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def printed(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def end(self, seconds: float = 250) -> int:
        """Its exit status, once it has one."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"still running after {seconds} s: {self.printed()}")
        return self.process.exitcode

    def succeed(self, seconds: float = 250) -> str:
        """What it printed; an error unless it ended well."""
        status = self.end(seconds)
        printed = self.printed()
        assert status == 0, f"exit status {status}:\n{printed}"
        return printed


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def together(log: Path, count: int, target: Callable, *arguments: Any, **options: Any) -> list[Running]:
    """As torchrun starts processes that form a group."""
    common = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GLOO_SOCKET_IFNAME": "lo", "GROUP_RANK": "0"}
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    logs = [log.with_name(f"{log.stem}-{rank}.log") for rank in range(count)]
    return [
        Running(file, target, *arguments, environment=environment, **options)
        for file, environment in zip(logs, ranks, strict=True)
    ]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """What a run wrote."""
    return load_file(out / "model.safetensors")


def assert_equal_bits(first: Path, second: Path) -> None:
    """Both runs wrote the same weights."""
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
