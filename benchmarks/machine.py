"""What the numbers were measured on."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import sasa


def machine() -> dict[str, Any]:
    """Processor, threads and versions."""
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
    }
    kernel = sasa_capability()
    return found if kernel is None else found | {"sasa_capability": kernel}


def sasa_capability() -> str | None:
    """Instruction set of sasa's compiled kernel; None without one."""
    try:
        from sasa.ops import cpu
    except ImportError:
        return None
    capability = getattr(cpu, "capability", None)
    if callable(capability):
        capability = capability()
    return None if capability is None else str(capability)


def in_words(found: dict[str, Any]) -> str:
    """The machine in a line."""
    threads = f"{found['threads']} thread{'' if found['threads'] == 1 else 's'}"
    return f"{found['cpu']} ({found['capability']}), {threads}, PyTorch {found['torch']}"


def import_seconds(turns: int = 7) -> dict[str, float]:
    """Median seconds that importing sasa takes once torch is imported."""
    code = "import time, torch; s = time.perf_counter(); import sasa; print(time.perf_counter() - s)"
    runs = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(turns)
    ]
    return {"median": statistics.median(runs), "lowest": min(runs), "highest": max(runs)}
