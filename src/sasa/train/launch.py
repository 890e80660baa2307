"""How many processes there are and which one this is: alone, under torchrun, under SLURM, or started by Lightning."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import lightning
import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import distributed

from .errors import OptionError
from .recipe import PROCESSES, Recipe

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals of a scheduler reclaiming its machine: SLURM, Kubernetes and torchrun send the first, or a chosen one."""

PATIENCE = timedelta(minutes=10)
"""How long processes wait for each other at start-up."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        rank: number of this process, from 0.
        per_node: processes on each machine.
        nodes: number of machines.
        accelerator: cpu, gpu or another of Lightning's names.
        launcher: torchrun, slurm or lightning.
    """

    rank: int
    per_node: int
    nodes: int
    accelerator: str
    launcher: str = "lightning"

    @property
    def world_size(self) -> int:
        """Total number of processes."""
        return self.per_node * self.nodes

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0


def find_processes(recipe: Recipe) -> Processes:
    """The processes that torchrun or SLURM have started, or that Lightning will start.

    Raises:
        OptionError: this machine doesn't have the devices or accelerator.
    """
    accelerator = recipe.accelerator
    gpus = CUDAAccelerator.is_available() or MPSAccelerator.is_available()
    if accelerator == "auto":
        accelerator = "gpu" if gpus else "cpu"
    if accelerator == "gpu" and not gpus:
        raise OptionError("accelerator: expected auto or cpu on a machine without a GPU, got gpu")
    if accelerator not in ("cpu", "gpu", "cuda", "mps", "xpu"):
        raise OptionError(f"accelerator: expected auto, cpu or gpu, got {accelerator!r}")
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        per_node, world = int(environment["LOCAL_WORLD_SIZE"]), int(environment["WORLD_SIZE"])
        return Processes(int(environment["RANK"]), per_node, world // per_node, accelerator, "torchrun")
    if SLURMEnvironment.detect():
        nodes, world = int(environment.get("SLURM_NNODES", 1)), int(environment["SLURM_NTASKS"])
        return Processes(SLURMEnvironment().global_rank(), world // nodes, nodes, accelerator, "slurm")
    per_node = _devices(recipe.devices, accelerator)
    # Lightning starts the others itself, by rerunning this command with LOCAL_RANK set.
    rank = int(environment.get("NODE_RANK", 0)) * per_node + int(environment.get("LOCAL_RANK", 0))
    return Processes(rank, per_node, recipe.num_nodes, accelerator)


def restarts() -> int:
    """How often torchrun has restarted this process after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def make_trainer(recipe: Recipe, processes: Processes, **options: Any) -> lightning.Trainer:
    """Lightning's trainer on those processes; ``options`` are its other arguments."""
    strategy: Any = "auto"
    if recipe.strategy == "fsdp":
        sizes = {"data_parallel_size": processes.world_size, "tensor_parallel_size": 1}
        strategy = _Sharded(processes, **sizes, save_distributed_checkpoint=False)
    elif processes.world_size > 1 or recipe.strategy == "ddp":
        # Gradients are views of the buckets they are reduced in, which saves a copy in memory.
        strategy = _Copied(processes, gradient_as_bucket_view=True)
    return lightning.Trainer(
        accelerator=processes.accelerator,
        devices=processes.per_node,
        num_nodes=processes.nodes,
        strategy=strategy,
        precision=recipe.precision,
        use_distributed_sampler=False,  # the batches are already distributed
        enable_model_summary=False,
        **options,
    )


class _Joining:
    """A strategy whose processes form their group through :func:`join`."""

    cluster_environment: Any

    def __init__(self, processes: Processes, **options: Any) -> None:
        super().__init__(**options)
        self.processes = processes

    def setup_environment(self) -> None:
        """Form the group before Lightning would."""
        join(self.processes, self.cluster_environment.main_port)
        super().setup_environment()  # type: ignore[misc]


class _Copied(_Joining, DDPStrategy):
    pass


class _Sharded(_Joining, ModelParallelStrategy):
    pass


def join(processes: Processes, port: int) -> None:
    """Form the process group where PyTorch's own way isn't suitable: under torchrun, and on one machine.

    On one machine, sockets listen only on the loopback interface; PyTorch's listen on all interfaces. (Under torchrun,
    its agent has a socket that does.) Several machines under SLURM or Lightning are left to PyTorch.
    """
    alone = processes.nodes == 1
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if alone and loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    if distributed.is_initialized():
        return
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = _torchrun_store(processes)
    elif alone and processes.launcher == "lightning":
        store = _loopback_store(processes, port)
    else:
        return
    gpu = processes.accelerator in ("gpu", "cuda")
    if gpu:
        torch.cuda.set_device(processes.rank % processes.per_node)
    backend = "nccl" if gpu else "gloo"
    distributed.init_process_group(backend, store=store, rank=processes.rank, world_size=processes.world_size)


def _loopback_store(processes: Processes, port: int) -> Any:
    """A store that listens on 127.0.0.1."""
    if not processes.first:
        return distributed.TCPStore("127.0.0.1", port, processes.world_size, timeout=PATIENCE)
    listening = socket.create_server(("127.0.0.1", port))
    # The store closes the socket when it ends.
    return distributed.TCPStore(
        "127.0.0.1", port, processes.world_size, is_master=True, timeout=PATIENCE, wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )  # fmt: skip


def _torchrun_store(processes: Processes) -> Any:
    """A section of torchrun's store that is new after every restart of the processes.

    In a shared section they would find the addresses of the failed processes and might use them.

    Raises:
        OptionError: there are several machines, which may disagree on the number of restarts.
    """
    environment = os.environ
    if processes.nodes > 1 and int(environment.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise OptionError(
            "torchrun: expected TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment on several machines with "
            "--max-restarts, got none"
        )
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = distributed.TCPStore(address, port, processes.world_size, is_master=False, timeout=PATIENCE)
    return distributed.PrefixStore(f"sasa/{restarts()}", store)


def _devices(devices: int | str, accelerator: str) -> int:
    available = max(1, torch.cuda.device_count()) if accelerator in ("gpu", "cuda") else 1
    if devices == "auto":
        return available
    if not str(devices).isdecimal() or not 1 <= int(devices) <= PROCESSES:
        raise OptionError(f"devices: expected auto or a number of processes from 1 to {PROCESSES}, got {devices!r}")
    if accelerator != "cpu" and int(devices) > available:
        raise OptionError(f"devices: expected at most {available}, got {devices}")
    return int(devices)
