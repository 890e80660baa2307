"""A study's picture: the metric along x, with the spread over the seeds, one line for each value compared."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter
from matplotlib.transforms import offset_copy

from .plan import NUMBERS, PERCENT, as_text

MARKERS = "osD^vP*X"

LABELS = {
    "top1": "validation top-1 accuracy",
    "top5": "validation top-5 accuracy",
    "val_loss": "validation loss (nats)",
    "flops": "cost of an image's forward (MFLOPs)",
    "parameters": "parameters (thousands)",
    "seconds_per_epoch": "seconds an epoch",
}
SCALES = {"flops": 1e6, "parameters": 1e3}


def plot(results: dict[str, Any]) -> Figure:
    """Draw what was gathered: means with standard deviations, and each seed's value as a faint dot."""
    metric, plan = results["metric"], results["plan"]
    x, line = plan["plot"]["x"], plan["plot"]["line"]
    cells = [cell for cell in results["cells"] if cell["n"] and cell["x"] is not None]
    numeric = all(isinstance(cell["x"], (int, float)) and not isinstance(cell["x"], bool) for cell in cells)
    scale = SCALES.get(x, 1) if x in NUMBERS else 1
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    beside = offset_copy(axes.transData, figure, x=5, units="points")  # or the error bars would hide the seeds
    for index, (label, points) in enumerate(_lines(cells, x, line).items()):
        if numeric:
            points.sort(key=lambda cell: cell["x"])
        places = [cell["x"] / scale if numeric else as_text(cell["x"]) for cell in points]
        drawn = axes.errorbar(
            places,
            [cell["mean"] for cell in points],
            yerr=[math.nan if cell["standard_deviation"] is None else cell["standard_deviation"] for cell in points],
            marker=MARKERS[index % len(MARKERS)],
            capsize=3,
            label=label,
        )
        for place, cell in zip(places, points, strict=True):
            values = list(cell["values"].values())
            color = drawn.lines[0].get_color()
            axes.plot([place] * len(values), values, ".", color=color, alpha=0.4, transform=beside)
    axes.set(xlabel=LABELS.get(x, x), ylabel=LABELS.get(metric, metric))
    if metric in PERCENT:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    if numeric and cells and x == "parameters":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(alpha=0.3)
    if cells:
        axes.legend(title=line, fontsize=8, title_fontsize=8)
    axes.set_title(results["title"], fontsize=11, wrap=True, parse_math=False)
    seeds = len(plan["seeds"])
    if seeds > 1:
        figure.supxlabel(f"mean and standard deviation of {seeds} seeds; faint: each seed", fontsize=8, color="0.4")
    return figure


def _lines(cells: list[dict[str, Any]], x: str, line: str) -> dict[str, list[dict[str, Any]]]:
    """The points of each line. Along an option of the grid, cells that differ in a third option are lines apart."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        apart = {key: value for key, value in cell["options"].items() if key not in (x, line)}
        label = as_text(cell["options"][line])
        if x in cell["options"] and apart:
            label += f", {', '.join(f'{key} {as_text(value)}' for key, value in apart.items())}"
        found.setdefault(label, []).append(cell)
    return found
