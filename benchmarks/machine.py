"""The machine that the numbers were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import sasa
from sasa.ops import cpu

ROOT = Path(__file__).parent.parent


def machine(device: str = "cpu") -> dict[str, Any]:
    """Names and versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    found = {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sasa": sasa.__version__,
        "sasa_capability": cpu.capability(),
    }
    if device == "cpu":
        return found
    properties = getattr(torch, device).get_device_properties(0)
    found |= {"gpu": properties.name, "cores": os.cpu_count(), "memory_gigabytes": properties.total_memory / 1e9}
    found |= {package: version(package) for package in ("triton", "timm", "natten")}
    if device == "cuda":
        found |= {
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "driver": driver(),
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """Version of NVIDIA's driver, as reported by nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def described(found: dict[str, Any]) -> str:
    """A one-line description of the machine."""
    if "gpu" in found:
        parts = [found["gpu"], f"driver {found['driver']}" if found.get("driver") else ""]
        parts += [f"PyTorch {found['torch']}", f"Triton {found['triton']}" if found.get("triton") else ""]
        return ", ".join(filter(None, parts))
    threads = f"{found['threads']} thread{'' if found['threads'] == 1 else 's'}"
    return f"{found['cpu']} ({found['capability']}), {threads}, PyTorch {found['torch']}"
