"""How many processes there are and which one this is: alone, under torchrun, under SLURM, or started by Lightning."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import lightning
import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch import distributed

from .errors import OptionError
from .recipe import Recipe

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Of a scheduler that wants its machine back: SLURM, Kubernetes and torchrun send the first, or what they are told."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        rank: this one, from 0.
        per_node: on each machine.
        nodes: machines.
        accelerator: cpu, gpu or what Lightning else calls it.
    """

    rank: int
    per_node: int
    nodes: int
    accelerator: str

    @property
    def world_size(self) -> int:
        """All of them."""
        return self.per_node * self.nodes

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and tells the user."""
        return self.rank == 0


def find_processes(recipe: Recipe) -> Processes:
    """The processes that torchrun or SLURM have started, or that Lightning is to start.

    Raises:
        OptionError: devices or num_nodes that can't be meant, or contradict the launcher.
    """
    accelerator = recipe.accelerator
    if accelerator == "auto":
        accelerator = "gpu" if CUDAAccelerator.is_available() or MPSAccelerator.is_available() else "cpu"
    if accelerator == "gpu" and not (torch.cuda.is_available() or MPSAccelerator.is_available()):
        raise OptionError("accelerator: expected auto or cpu on a machine without a GPU, got gpu")
    if accelerator not in ("cpu", "gpu", "cuda", "mps", "xpu"):
        raise OptionError(f"accelerator: expected auto, cpu or gpu, got {accelerator!r}")
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        per_node, world = int(environment["LOCAL_WORLD_SIZE"]), int(environment["WORLD_SIZE"])
        return Processes(int(environment["RANK"]), per_node, world // per_node, accelerator)
    if SLURMEnvironment.detect():
        slurm, world = SLURMEnvironment(), int(environment["SLURM_NTASKS"])
        nodes = int(environment.get("SLURM_NNODES", 1))
        return Processes(slurm.global_rank(), world // nodes, nodes, accelerator)
    per_node = _devices(recipe.devices, accelerator)
    # Lightning starts the others itself, as this command again with LOCAL_RANK set.
    rank = int(environment.get("NODE_RANK", 0)) * per_node + int(environment.get("LOCAL_RANK", 0))
    return Processes(rank, per_node, recipe.num_nodes, accelerator)


def restarts() -> int:
    """How often torchrun has started this process anew after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def strategy(recipe: Recipe, processes: Processes) -> Any:
    """Lightning's strategy. Under torchrun, this process has joined the others when it is returned."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and processes.world_size > 1:
        join(processes)
    if recipe.strategy == "fsdp":
        from lightning.pytorch.strategies import ModelParallelStrategy

        return ModelParallelStrategy(
            data_parallel_size=processes.world_size, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    if processes.world_size == 1 and recipe.strategy == "auto":
        return "auto"
    from lightning.pytorch.strategies import DDPStrategy

    # Gradients are views of the buckets they are summed in: one copy less of them in memory.
    return DDPStrategy(gradient_as_bucket_view=True)


def make_trainer(recipe: Recipe, processes: Processes, **options: Any) -> lightning.Trainer:
    """Lightning's trainer on those processes; ``options`` are its other arguments."""
    return lightning.Trainer(
        accelerator=processes.accelerator,
        devices=processes.per_node,
        num_nodes=processes.nodes,
        strategy=strategy(recipe, processes),
        precision=recipe.precision,
        use_distributed_sampler=False,  # the batches are shared out already
        enable_model_summary=False,
        **options,
    )


def join(processes: Processes, timeout: float = 600.0) -> None:
    """Form the group of the processes that torchrun has started, in a part of its store that is new each time.

    When torchrun starts the processes anew after a failure, they get the store of the failed ones, where the addresses
    of those still are; PyTorch's own way of joining takes them for the new ones if it reads them first. Restarts are
    not counted alike on all machines, so the processes agree on a name: each says hello with a number of its own, the
    first answers every number with the session's name, and waits until all have heard it.

    Raises:
        TimeoutError: not all processes came.
    """
    if distributed.is_initialized():
        return
    store = distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), processes.world_size, is_master=False
    )
    if processes.first:
        name = secrets.token_hex(8)
        waited, answered = set(range(1, processes.world_size)), set()
        _until(lambda: _answered(store, name, waited, answered), timeout)
    else:
        number = secrets.token_hex(8)
        store.set(f"sasa/hello/{processes.rank}", number)
        store.wait([f"sasa/answer/{number}"], timedelta(seconds=timeout))
        name = store.get(f"sasa/answer/{number}").decode()
        store.set(f"sasa/{name}/{processes.rank}", "heard")
    gpu = processes.accelerator in ("gpu", "cuda")
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(
        "nccl" if gpu else "gloo",
        store=distributed.PrefixStore(f"sasa/{name}", store),
        rank=processes.rank,
        world_size=processes.world_size,
    )


def _answered(store: Any, name: str, waited: set[int], answered: set[str]) -> bool:
    """Answer those who say hello; whether all have heard."""
    for rank in sorted(waited):
        if store.check([f"sasa/hello/{rank}"]):
            number = store.get(f"sasa/hello/{rank}").decode()
            if number not in answered:
                store.set(f"sasa/answer/{number}", name)
                answered.add(number)
        if store.check([f"sasa/{name}/{rank}"]):
            waited.discard(rank)
    return not waited


def _until(done: Callable[[], bool], timeout: float) -> None:
    end = time.monotonic() + timeout
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"torchrun: expected all processes to come within {timeout:.0f} s")
        time.sleep(0.05)


def _devices(devices: int | str, accelerator: str) -> int:
    available = max(1, torch.cuda.device_count()) if accelerator in ("gpu", "cuda") else 1
    if devices == "auto":
        return available
    if not str(devices).isdigit() or not int(devices):
        raise OptionError(f"devices: expected auto or a number of processes from 1, got {devices!r}")
    if accelerator != "cpu" and int(devices) > available:
        raise OptionError(f"devices: expected at most {available}, got {devices}")
    return int(devices)
