"""What one ImageNet training run of SASA-ResNet-50 would cost on 1 to 1,024 GPUs: A MODEL, NOT A MEASUREMENT.

python -m benchmarks.scale     writes benchmarks/results/scale.json and scale.png, and the tables of docs/scale.md
"""

from __future__ import annotations

import json

from ..processes import ROOT
from ..readme import with_tables
from .model import FILE
from .plot import draw
from .runs import run

PAGE = ROOT / "docs/scale.md"


def main() -> None:
    """Compute, write, draw; fill the page's tables."""
    found = run()
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    draw(found, FILE.with_suffix(".png"))
    PAGE.write_text(with_tables(PAGE.read_text()))
    print(f"wrote {FILE.relative_to(ROOT)}, its picture and the tables of {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
