"""Seconds per image of the study's detectors, on one core: ``python docs/studies/bccd/cost.py`` writes cost.json.

Photographs of 640 x 480, as the study has them; each round takes them in turn; medians of all rounds.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
import yaml

from sasa.models import count_flops, retinanet
from sasa.study.machine import Slots, study_machine

HERE = Path(__file__).parent
ROUNDS, BATCH = 8, 4


def main() -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    plan = yaml.safe_load((HERE / "plan.yaml").read_text())
    sizes = {"min_size": 128, "max_size": 213}
    torch.manual_seed(0)
    detectors = {
        f"backbone {one['backbone']}, heads {one['heads']}": retinanet(num_classes=3, **sizes, **one)
        for one in plan["grid"]["model_options"]
    }
    images = [torch.rand(3, 480, 640) for _ in range(BATCH)]
    boxes = torch.tensor([[40.0, 40, 150, 150], [200, 200, 310, 320], [400, 100, 430, 130]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 1, 0])} for _ in images]
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(ROUNDS + 1):
        for name, network in detectors.items():
            begin = time.perf_counter()
            sum(network.train()(images, targets).values()).backward()
            middle = time.perf_counter()
            with torch.no_grad():
                network.eval()(images)
            if number:  # the first round warms up
                seconds.setdefault((name, "training_step"), []).append((middle - begin) / BATCH)
                seconds.setdefault((name, "inference"), []).append((time.perf_counter() - middle) / BATCH)
    found = {
        name: {
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "flops": count_flops(network, (1, 3, 480, 640)),
            **{
                f"{what}_seconds_an_image": {
                    "median": statistics.median(values),
                    "standard_deviation": statistics.stdev(values),
                }
                for (of, what), values in seconds.items()
                if of == name
            },
        }
        for name, network in detectors.items()
    }
    text = json.dumps({"machine": study_machine(Slots((None,), 1)), "rounds": ROUNDS} | found, indent=2)
    (HERE / "cost.json").write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
