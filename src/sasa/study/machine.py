"""The machine that a study was trained on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__


@dataclass(frozen=True)
class Slots:
    """Slots for concurrent training runs.

    Attributes:
        gpus: the GPU of each, as in CUDA_VISIBLE_DEVICES; None for the CPU.
        threads: of each.
    """

    gpus: tuple[str | None, ...]
    threads: int


def find_slots(parallel: int, on_cpu: bool) -> Slots:
    """The visible GPUs, each ``parallel`` times; the CPU that many times if there are none, or with ``on_cpu``."""
    import torch

    count = 0 if on_cpu else torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",")] if visible else [str(index) for index in range(count)]
    gpus = tuple(names[:count]) * parallel if count else (None,) * parallel
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Slots(gpus, int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // len(gpus))))


def study_machine(slots: Slots) -> dict[str, Any]:
    """Processor, GPUs, threads and versions."""
    import torch

    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": _gpu_names(sorted({gpu for gpu in slots.gpus if gpu is not None})),
        "runs_at_once": len(slots.gpus),
        "threads_a_run": slots.threads,
        "python": platform.python_version(),
        "sasa": __version__,
        "torch": str(torch.__version__),
        **{package: importlib.metadata.version(package) for package in ("timm", "lightning")},
    }


def machine_line(found: dict[str, Any]) -> str:
    """A one-line description of the machine."""
    threads = f"{found['threads_a_run']} thread{'' if found['threads_a_run'] == 1 else 's'}"
    where = ", ".join(found["gpus"]) or f"{found['cpu']} ({found['capability']}), {threads} per training"
    return f"{where}, {found['runs_at_once']} at once, PyTorch {found['torch']}, sasa {found['sasa']}"


def _gpu_names(gpus: list[str]) -> list[str]:
    """Queried with the driver's tool: PyTorch would initialise the GPUs in this process, which computes nothing."""
    if not gpus:
        return []
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", f"--id={','.join(gpus)}"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ["unknown"] * len(gpus)
    return [name.strip() for name in done.stdout.splitlines() if name.strip()]
