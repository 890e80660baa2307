"""Cost of the compared networks on one CPU core: a training step and a forward, in time per image, and memory.

    python -m benchmarks.evidence.cost

Run it on an idle machine; each network runs in its own process, so that memory is measured separately.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sasa.models import count_flops, create_model

from ..machine import machine
from .networks import NETWORKS

BATCH = 64
SIZES = {"fashion": (1, 28, 28), "cifar": (3, 32, 32)}
WIDTHS = {"fashion": (0.5, 1.0), "cifar": (0.5, 1.0)}


def measure(name: str, width: float, shape: tuple[int, int, int]) -> dict[str, Any]:
    """The median of some steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = create_model("sasa_resnet14", 10, shape[0], width=width, **NETWORKS[name])
    network = network.to(memory_format=torch.channels_last)
    flops = count_flops(network.eval(), (1, *shape))
    optimizer = torch.optim.AdamW(network.parameters())
    images = torch.randn(BATCH, *shape).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,))

    def step() -> None:
        loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    network.eval()
    with torch.no_grad():
        forward = _median(lambda: network(images))
    network.train()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    training = _median(step)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "flops": flops,
        "forward_ms_per_image": forward * 1e3 / BATCH,
        "training_ms_per_image": training * 1e3 / BATCH,
        "training_memory_mb": (after - before) / 1024,
    }


def _median(run: Any) -> float:
    times = []
    for _ in range(6):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def main() -> None:
    """The command; with arguments, one network in this process."""
    if len(sys.argv) > 1:
        name, width, shape = json.loads(sys.argv[1])
        print(json.dumps(measure(name, width, tuple(shape))))
        return
    found: dict[str, Any] = {"batch": BATCH, "machine": machine()}
    for data, shape in SIZES.items():
        for width in WIDTHS[data]:
            for name in NETWORKS:
                line = [sys.executable, "-m", "benchmarks.evidence.cost", json.dumps([name, width, shape])]
                done = subprocess.run(line, check=True, capture_output=True, text=True)
                found.setdefault(data, {}).setdefault(str(width), {})[name] = json.loads(done.stdout)
                print(data, width, name, done.stdout.strip(), flush=True)
    out = Path(__file__).parent / "results" / "cost.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
