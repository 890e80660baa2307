"""Training curves: loss and accuracy over the epochs, from the logs of training runs."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter


def read_metric(log: Path, name: str) -> tuple[list[int], list[float]]:
    """Epochs (from 1) and values of one column of a ``metrics.csv``.

    Raises:
        ValueError: the log has no such column.
    """
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(int(row["epoch"]) + 1, float(row[name])) for row in rows if row.get(name)]
    if not found:
        raise ValueError(f"name: expected a column with values in {log}, got {name!r}")
    epochs, values = zip(*found, strict=True)
    return list(epochs), list(values)


def plot_curves(
    logs: Mapping[str, Path],
    title: str = "",
    column: str = "val_top1",
    label: str = "validation top-1 accuracy",
) -> Figure:
    """Training loss and a validation metric of several runs, side by side.

    Args:
        logs: ``metrics.csv`` of each run, by the name to show.
        title: of the figure.
        column: of the logs: a share from 0 to 1.
        label: of that column.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for name, log in logs.items():
        loss.plot(*read_metric(log, "train_loss"), marker=".", label=name)
        epochs, shares = read_metric(log, column)
        accuracy.plot(epochs, shares, marker=".", label=f"{name}: {shares[-1]:.1%} at the end")
    loss.set(xlabel="epoch", ylabel="training loss", title="loss")
    accuracy.set(xlabel="epoch", ylabel=label, title="accuracy" if column == "val_top1" else label)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for panel in (loss, accuracy):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    if title:
        figure.suptitle(title)
    return figure
