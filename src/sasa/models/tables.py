"""The paper's tables 1, 3 and 4, recomputed for this package's networks, next to the paper's figures.

Source of the figures: arXiv 1906.05909, tables 1, 3 and 4. Accuracies need training and are not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import timm

from .flops import count_flops
from .presets import PAPER_DEPTHS

IMAGE = (1, 3, 224, 224)


class Row(NamedTuple):
    """A network and what it costs.

    Attributes:
        name: as in the table.
        flops: of one image, in 10^9; a multiply-add is 2.
        parameters: in 10^6.
        paper_flops: the paper's figure, rounded to 0.1.
        paper_parameters: likewise; None where the paper has none.
    """

    name: str
    flops: float
    parameters: float
    paper_flops: float
    paper_parameters: float | None

    @property
    def flops_difference(self) -> float:
        """Ours minus the paper's."""
        return self.flops - self.paper_flops

    @property
    def parameters_difference(self) -> float | None:
        """Ours minus the paper's."""
        return None if self.paper_parameters is None else self.parameters - self.paper_parameters


class Table(NamedTuple):
    """One table of the paper."""

    title: str
    rows: tuple[Row, ...]


# (depth, suffix of the network's name) -> the paper's FLOPs and parameters.
TABLE_1 = {
    (26, "_conv"): (4.7, 13.7),
    (26, "_convstem"): (4.5, 10.3),
    (26, ""): (4.7, 10.3),
    (38, "_conv"): (6.5, 19.6),
    (38, "_convstem"): (5.7, 14.1),
    (38, ""): (6.0, 14.1),
    (50, "_conv"): (8.2, 25.6),
    (50, "_convstem"): (7.0, 18.0),
    (50, ""): (7.2, 18.0),
}
# Stages that attend.
TABLE_3 = {
    (1, 2, 3, 4): (7.0, 18.0),
    (2, 3, 4): (7.3, 18.1),
    (3, 4): (7.5, 18.5),
    (4,): (8.0, 20.8),
    (): (8.2, 25.6),
    (1,): (7.9, 25.5),
    (1, 2): (7.8, 25.0),
    (1, 2, 3): (7.2, 22.7),
}
# Window of the attention.
TABLE_4 = {3: 6.6, 5: 6.7, 7: 7.0, 9: 7.3, 11: 7.7}
WHAT = {"_conv": "convolution", "_convstem": "convolution stem + attention", "": "full attention"}


def paper_tables() -> tuple[Table, ...]:
    """Tables 1, 3 and 4, recomputed."""
    return (
        Table(
            "Table 1: ImageNet networks",
            tuple(
                _row(f"ResNet-{depth}, {WHAT[variant]}", paper, f"sasa_resnet{depth}{variant}")
                for depth in PAPER_DEPTHS
                for variant in WHAT
                for paper in [TABLE_1[depth, variant]]
            ),
        ),
        Table(
            "Table 3: ResNet-50 with a convolution stem, attention in stages",
            tuple(
                _row(", ".join(map(str, stages)) or "none", paper, attention_stages=stages)
                for stages, paper in TABLE_3.items()
            ),
        ),
        Table(
            "Table 4: ResNet-50 with a convolution stem, window of the attention",
            tuple(_row(f"{k}x{k}", (paper, None), kernel_size=k) for k, paper in TABLE_4.items()),
        ),
    )


def _row(
    label: str, paper: tuple[float, float | None], network: str = "sasa_resnet50_convstem", **arguments: Any
) -> Row:
    return Row(label, *_cost(network, **arguments), *paper)


@cache
def _cost(network: str, **arguments: Any) -> tuple[float, float]:
    """FLOPs in 10^9 and parameters in 10^6. Built on the meta device: nothing is allocated or computed."""
    model = timm.create_model(network, device="meta", **arguments).eval()
    return count_flops(model, IMAGE) / 1e9, sum(p.numel() for p in model.parameters()) / 1e6


def as_text(tables: Sequence[Table], side: int = IMAGE[-1]) -> str:
    """The tables, of square images of ``side`` pixels, as aligned text: ours, the paper's, and the difference."""
    header = ("", "GFLOPs", "paper", "diff.", "M params", "paper", "diff.")
    lines = []
    for table in tables:
        rows = [header, *(_cells(row) for row in table.rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines.append(table.title)
        for row in rows:
            name, *figures = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join([row[0].ljust(len(name)), *figures]).rstrip())
        lines.append("")
    return "\n".join([*lines, f"A multiply-add is 2 FLOPs; one image of {side}x{side}."])


def _cells(row: Row) -> tuple[str, ...]:
    cells = [row.name, f"{row.flops:.2f}", f"{row.paper_flops:.1f}", f"{row.flops_difference:+.2f}"]
    cells.append(f"{row.parameters:.2f}")
    if row.paper_parameters is not None and row.parameters_difference is not None:
        cells += [f"{row.paper_parameters:.1f}", f"{row.parameters_difference:+.2f}"]
    else:
        cells += ["", ""]
    return tuple(cells)
