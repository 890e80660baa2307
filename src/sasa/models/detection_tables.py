"""The paper's table 2, recomputed for this package's detectors, next to the paper's figures.

Source of the figures: arXiv 1906.05909, table 2. The paper gives neither image size nor anchors nor classes. Its
baseline, 182 B FLOPs and 33.4 M parameters, matches torchvision's RetinaNet at 640x640 with six anchors per position
(two scales) and 90 classes, and no other usual configuration.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from .detection import SasaRetinaNet
from .flops import count_flops
from .tables import WHAT, Row, Table, as_text

SIDE = 640
SETTING: dict[str, Any] = {"num_classes": 90, "anchor_scales": 2}

# (heads, end of the backbone's name) -> the paper's FLOPs in 10^9 and parameters in 10^6.
TABLE_2 = {
    ("convolution", "_conv"): (182.0, 33.4),
    ("convolution", "_convstem"): (173.0, 25.9),
    ("convolution", ""): (173.0, 25.9),
    ("attention", "_convstem"): (111.0, 22.0),
    ("attention", ""): (110.0, 22.0),
}


def detection_tables() -> tuple[Table, Table]:
    """Table 2, recomputed; and a row with attention in the pyramid too, as in the paper's text."""
    return (
        Table("Table 2: RetinaNet, ResNet-50", tuple(_row(heads, variant) for heads, variant in TABLE_2)),
        Table("The same with attention in the pyramid too", (_row("attention", "_convstem", pyramid="attention"),)),
    )


def _row(heads: str, variant: str, **options: Any) -> Row:
    name = f"heads: {heads}, backbone: {WHAT[variant]}"
    return Row(name, *_cost(variant, heads, **options), *TABLE_2[heads, variant])


def reductions(table: Table, baseline: Row) -> str:
    """How far FLOPs and parameters of the other rows are below the baseline's, in percent: ours and the paper's."""
    lines = []
    for row in (row for row in table.rows if row is not baseline):
        flops = row.flops / baseline.flops - 1, row.paper_flops / baseline.paper_flops - 1
        parameters = row.parameters / baseline.parameters - 1
        paper = (row.paper_parameters or 0) / (baseline.paper_parameters or 1) - 1
        lines.append(
            f"{row.name}: FLOPs {flops[0]:+.1%} (paper {flops[1]:+.1%}), "
            f"parameters {parameters:+.1%} (paper {paper:+.1%})"
        )
    return "\n".join(lines)


@cache
def _cost(variant: str, heads: str, **options: Any) -> tuple[float, float]:
    """FLOPs in 10^9 and parameters in 10^6. Built on the meta device: nothing is allocated or computed."""
    with torch.device("meta"):
        detector = SasaRetinaNet(f"sasa_resnet50{variant}", heads, **SETTING, **options).eval()
    flops = count_flops(detector.dense(), (1, 3, SIDE, SIDE))
    return flops / 1e9, sum(p.numel() for p in detector.parameters()) / 1e6


def text() -> str:
    """The tables and the reductions as aligned text."""
    tables = detection_tables()
    baseline = tables[0].rows[0]
    below = [f"{table.title}, against convolution alone:\n{reductions(table, baseline)}" for table in tables]
    return "\n\n".join([as_text(tables, SIDE), *below])
