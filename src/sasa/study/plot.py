"""A study's plot: the metric along x, with the spread over the seeds, one line for each value compared."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import offset_copy

from .gather import PERCENT
from .plan import as_text, labels

AXES = {
    "top1": ("validation top-1 accuracy", 1),
    "ap": ("validation AP", 1),
    "ap50": ("validation AP50", 1),
    "top5": ("validation top-5 accuracy", 1),
    "val_loss": ("validation loss (nats)", 1),
    "flops": ("cost of an image's forward (MFLOPs)", 1e6),
    "parameters": ("parameters (thousands)", 1e3),
    "seconds_per_epoch": ("seconds per epoch", 1),
}
"""Label and unit."""


def plot(results: dict[str, Any]) -> Figure:
    """Plot the gathered results: means with standard deviations, and each seed's value as a faint dot."""
    metric, plan = results["metric"], results["plan"]
    x, line, seeds = plan["plot"]["x"], plan["plot"]["line"], len(plan["seeds"])
    cells = [cell for cell in results["cells"] if cell["n"] and cell["x"] is not None]
    numeric = all(type(cell["x"]) in (int, float) for cell in cells)
    label, unit = AXES.get(x, (x, 1))
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    beside = offset_copy(axes.transData, figure, x=5, units="points")  # otherwise the error bars would hide the seeds
    for marker, (name, points) in enumerate(_lines(cells, x, line, plan["grid"][line]).items()):
        if numeric:
            points.sort(key=lambda cell: cell["x"])
        places = [cell["x"] / unit if numeric else as_text(cell["x"]) for cell in points]
        spread = [math.nan if cell["standard_deviation"] is None else cell["standard_deviation"] for cell in points]
        means = [cell["mean"] for cell in points]
        drawn = axes.errorbar(places, means, spread, marker="osD^vP*X"[marker % 8], capsize=3, label=name)
        for place, cell in zip(places, points, strict=True):
            values, color = list(cell["values"].values()), drawn.lines[0].get_color()
            axes.plot([place] * len(values), values, ".", color=color, alpha=0.4, transform=beside)
    axes.set(xlabel=label, ylabel=AXES.get(metric, (metric, 1))[0])
    if metric in PERCENT:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    if cells:
        axes.legend(title=line, fontsize=8, title_fontsize=8)
    axes.set_title(results["title"], fontsize=11, wrap=True, parse_math=False)
    if seeds > 1:
        figure.supxlabel(f"mean and standard deviation of {seeds} seeds; faint: each seed", fontsize=8, color="0.4")
    return figure


def _lines(cells: list[dict[str, Any]], x: str, line: str, values: list[Any]) -> dict[str, list[dict[str, Any]]]:
    """The points of each line. Along an option of the grid, cells that differ in a third option form separate lines."""
    found: dict[str, list[dict[str, Any]]] = {}
    names = dict(zip(map(as_text, values), labels(values), strict=True))
    for cell in cells:
        apart = [f"{key} {as_text(value)}" for key, value in cell["options"].items() if key not in (x, line)]
        own = as_text(cell["options"][line])
        label = [names.get(own, own), *(apart if x in cell["options"] else [])]
        found.setdefault(", ".join(label), []).append(cell)
    return found
