"""The machine, and what it does at best: bytes a second of a copy, FLOP/s of a matrix product in every precision."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
from typing import Any

import torch

import sasa
from sasa.ops import implementations

from .clock import QUICK, Clock, Pace, alternate
from .plan import Setting
from .precision import PRECISIONS

COPIED_BYTES, QUICK_COPIED_BYTES = 2 * 1024**3, 1024**2
PRODUCT_SIZE, QUICK_PRODUCT_SIZE = 8192, 64
PACE = Pace(50, 5, 5)
SAME = ("gpu", "torch", "triton", "sasa")  # what must be the same for results to be shown together


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """Version of NVIDIA's driver, as nvidia-smi says."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def identity(setting: Setting) -> dict[str, Any]:
    """Names and versions, nothing measured."""
    found: dict[str, Any] = {
        "gpu": f"none: {platform.processor() or platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "timm": version("timm"),
        "natten": version("natten"),
        "sasa": sasa.__version__,
    }
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gigabytes": properties.total_memory / 1e9,
            "driver": driver(),
            "cudnn": torch.backends.cudnn.version(),
        }
    elif setting.device == "xpu":
        properties = torch.xpu.get_device_properties(0)
        found |= {"gpu": properties.name, "memory_gigabytes": properties.total_memory / 1e9}
    return found


def chosen(setting: Setting) -> dict[str, str]:
    """Which of sasa's implementations a call that names none gets here, in each dtype."""
    dtypes = sorted({str(precision.dtype).removeprefix("torch.") for precision in PRECISIONS.values()})
    return {
        name: implementations.choose(
            None, torch.empty(1, 8, 16, 8, 8, dtype=getattr(torch, name), device=setting.device)
        ).name
        for name in dtypes
    }


def rate(amount: float, milliseconds: list[float]) -> dict[str, float]:
    """An amount a second: of the median turn, of the slowest and of the fastest."""
    return {
        "value": amount / statistics.median(milliseconds) * 1e3,
        "lowest": amount / max(milliseconds) * 1e3,
        "highest": amount / min(milliseconds) * 1e3,
    }


def copy_rate(clock: Clock, quick: bool) -> dict[str, float]:
    """Bytes read and written a second by a copy within the device's memory."""
    source = torch.randint(100, (QUICK_COPIED_BYTES if quick else COPIED_BYTES,), dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    medians, _ = alternate(clock, [lambda: target.copy_(source)], QUICK if quick else PACE)
    return rate(2 * source.numel(), medians[0])


def product_rates(clock: Clock, quick: bool) -> dict[str, dict[str, float]]:
    """FLOP/s of a square matrix product by precision."""
    size, rates = QUICK_PRODUCT_SIZE if quick else PRODUCT_SIZE, {}
    for name, precision in PRECISIONS.items():
        precision.allow()
        a, b = torch.randn(2, size, size, device=clock.device).to(precision.dtype)
        medians, _ = alternate(clock, [lambda a=a, b=b: a @ b], QUICK if quick else PACE)
        rates[name] = rate(2 * size**3, medians[0])
    return rates


def measured(clock: Clock, setting: Setting) -> dict[str, Any]:
    """What the machine does at best."""
    return {
        "copy_bytes_per_second": copy_rate(clock, setting.quick),
        "product_flops_per_second": product_rates(clock, setting.quick),
        "implementation": chosen(setting),
    }


def in_words(found: dict[str, Any]) -> str:
    """The machine in a line."""
    parts = [found["gpu"]]
    parts += [f"driver {found['driver']}"] if found.get("driver") else []
    parts += [f"PyTorch {found['torch']}"]
    parts += [f"Triton {found['triton']}"] if found.get("triton") else []
    line = ", ".join(parts)
    if "copy_bytes_per_second" in found:
        line += f"; copies {found['copy_bytes_per_second']['value'] / 1e12:.2f} TB/s (read and written)"
        products = found["product_flops_per_second"]
        line += ", matrix product " + ", ".join(f"{name} {products[name]['value'] / 1e12:.0f}" for name in products)
        line += " TFLOP/s"
    return line
