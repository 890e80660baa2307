"""What a study was trained on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .processes import Slots

PACKAGES = ("timm", "lightning", "optuna")


def machine(slots: Slots) -> dict[str, Any]:
    """Processor, GPUs, threads and versions."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), cpu)
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": _gpu_names(slots),
        "runs_at_once": len(slots.gpus),
        "threads_a_run": slots.threads,
        "python": platform.python_version(),
        "sasa": __version__,
        "torch": str(torch.__version__),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
    }


def in_words(found: dict[str, Any]) -> str:
    """The machine in a line."""
    threads = f"{found['threads_a_run']} thread{'' if found['threads_a_run'] == 1 else 's'}"
    where = ", ".join(found["gpus"]) or f"{found['cpu']} ({found['capability']}), {threads} a training"
    return f"{where}, {found['runs_at_once']} at once, PyTorch {found['torch']}, sasa {found['sasa']}"


def _gpu_names(slots: Slots) -> list[str]:
    """From the driver's tool: PyTorch would have to open the GPUs here, where nothing is computed."""
    found = sorted({gpu for gpu in slots.gpus if gpu is not None})
    if not found:
        return []
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", f"--id={','.join(found)}"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ["unknown"] * len(found)
    return [name.strip() for name in done.stdout.splitlines() if name.strip()]
