"""Memory of a training step of RetinaNet on one image of 1024x1024, of attention and of convolution.

    python -m benchmarks.detection                  on the CPU, minutes; writes benchmarks/results/detection.json
    python -m benchmarks.detection --device cuda    on a GPU, into the same file

A step is forward, losses, backward, and SGD with momentum, in float32, channels_last. The peak is measured above what
the process held before the step: parameters, gradients and momentum of an earlier one. Each detector runs in its own
process. ``python -m benchmarks.readme`` then fills in the table of docs/detection.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch

from .cases import Device
from .clock import clock_of
from .machine import ROOT, described, machine
from .results import RESULTS
from .tables import Listing

FILE = RESULTS / "detection.json"
SIDE, OBJECTS = 1024, 20
CONVOLUTION = "convolution"
# name -> arguments of sasa.models.retinanet.
DETECTORS: dict[str, dict[str, Any]] = {
    CONVOLUTION: {"backbone": "sasa_resnet50_conv", "heads": "convolution"},
    "attention": {"backbone": "sasa_resnet50", "heads": "attention"},
    "attention, convolution stem": {"backbone": "sasa_resnet50_convstem", "heads": "attention"},
    "attention, in the pyramid too": {"backbone": "sasa_resnet50", "heads": "attention", "pyramid": "attention"},
}


def measure(arguments: dict[str, Any], device: str, side: int = SIDE) -> dict[str, float]:
    """Peak of a step in GB, and parameters in millions."""
    from sasa.models import retinanet

    torch.manual_seed(0)
    detector = retinanet(**arguments, min_size=side, max_size=side)
    detector = detector.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3, momentum=0.9)
    corners = torch.rand(OBJECTS, 2, device=device) * 0.7 * side
    boxes = torch.cat([corners, corners + (0.02 + 0.28 * torch.rand(OBJECTS, 2, device=device)) * side], 1)
    labels = torch.randint(detector.head.classification_head.num_classes, (OBJECTS,), device=device)
    image = torch.rand(3, side, side, device=device)

    def step() -> None:
        optimizer.zero_grad()
        sum(detector([image], [{"boxes": boxes, "labels": labels}]).values()).backward()
        optimizer.step()

    step()
    peak = clock_of(Device(device)).peak_bytes(step)
    if peak is None:
        raise RuntimeError("this system doesn't count memory")
    return {"peak_gigabytes": peak / 1e9, "parameters": sum(p.numel() for p in detector.parameters()) / 1e6}


def listing(found: dict[str, Any]) -> Listing:
    """A device's peaks, and how much larger than the convolution's."""
    peers, least = found["peers"], found["peers"][CONVOLUTION]["peak_gigabytes"]
    rows = [
        [name, f"{own['parameters']:.1f}", f"{own['peak_gigabytes']:.2f}", f"{own['peak_gigabytes'] / least:.2f}"]
        for name, own in peers.items()
    ]
    header = ["detector", "M parameters", "peak GB", "times the convolution's"]
    return Listing(header, rows, f"{described(found['machine'])}.", words=1)


def main() -> None:
    """Measure every detector in its own process."""
    parser = argparse.ArgumentParser("benchmarks.detection", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda", "xpu"), default="cpu")
    parser.add_argument("--peer", choices=DETECTORS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer is not None:
        print(json.dumps(measure(DETECTORS[options.peer], options.device)))
        return
    found: dict[str, Any] = {"machine": machine(options.device), "side": SIDE, "peers": {}}
    for name in DETECTORS:
        command = [sys.executable, "-m", "benchmarks.detection", "--device", options.device, "--peer", name]
        printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        found["peers"][name] = json.loads(printed.splitlines()[-1])
        print(name, found["peers"][name], flush=True)
    devices = json.loads(FILE.read_text()) if FILE.exists() else {}
    FILE.write_text(json.dumps(devices | {options.device: found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
