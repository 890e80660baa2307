"""Put the trained networks of the plans ``weights-*`` into the package, with their results on test images.

    python -m benchmarks.evidence.ship --work runs/evidence

Uses those of the plans ``weights-*-long`` if they are finished; a network of which there is no run here stays as it is.
Writes the weights and figures.json next to them; the model card, README.md in the same folder, is written by hand.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from torchvision.datasets import FashionMNIST

from sasa.models import shipped_weights
from sasa.models.pretrained import read_facts
from sasa.train import load_model
from sasa.train.evaluate import evaluate
from sasa.train.weights import save_weights

from ..machine import ROOT

WEIGHTS = ROOT / "src/sasa/models/weights"
PLANS = {
    "clothing": ("weights-clothing-long", "weights-clothing"),
    "fashion_mnist": ("weights-fashion-long", "weights-fashion"),
}
"""Of each network, the best first."""


def counted(weights: Path, data: Path | None) -> dict[str, int]:
    """Number of validation images that a network classifies correctly, and their total."""
    found = evaluate(weights, data)
    return {"correct": round(found["top1"] * found["images"]), "images": found["images"]}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.ship")
    parser.add_argument("--work", type=Path, required=True, help="folder of the studies")
    work = parser.parse_args().work
    WEIGHTS.mkdir(exist_ok=True)
    written = WEIGHTS / "figures.json"
    figures: dict[str, Any] = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else {}
    for name, plans in PLANS.items():
        runs = [path for plan in plans for path in (work / "studies" / plan / "runs").glob("*/model.safetensors")]
        if not runs:
            print(f"{name}: no run in {work}; left as it is")
            continue
        path = runs[0]
        facts = read_facts(path)
        if name == "fashion_mnist":
            facts["classes"] = list(FashionMNIST.classes)  # IDX files have numbers
        save_weights(load_model(path)[0], WEIGHTS / f"{name}.safetensors", facts)
        recipe = json.loads((path.parent / "recipe.json").read_text())
        figures[name] = counted(shipped_weights()[name], work / "data" / Path(recipe["data"]).name)
        share = figures[name]["correct"] / figures[name]["images"]
        figures[name] |= {"standard_error": math.sqrt(share * (1 - share) / figures[name]["images"])}
        figures[name] |= {"classes": facts["classes"]}
        if name == "fashion_mnist":
            figures[name]["packaged"] = counted(shipped_weights()[name], None)
    written.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
