"""The results as bar charts: one panel per case, or a single panel if every case has one peer."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .cases import CONVOLUTION
from .machine import described
from .results import SKIPPED, Figures
from .tables import milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, OTHERS, CONVOLUTIONS = "tab:blue", "tab:orange", "tab:green"
MOST_CASES = 8  # of a part: those measured first


class Measure(NamedTuple):
    """What the length of a bar is."""

    key: str
    label: str
    form: str = "{:.3g}"
    log: bool = True


TIME, MEMORY = Measure("seconds", "time"), Measure("peak_gigabytes", "peak GB above the input")
MEASURES = {
    "ceiling": (Measure("gflops", "GFLOP/s", "{:.0f}", False),),
    "attention": (TIME, MEMORY),
    "layer": (TIME, MEMORY),
    "kept": (TIME, MEMORY),
    "stem": (TIME, MEMORY),
    "stages": (Measure("gflops", "GFLOP/s", "{:.0f}", False),),
    "scaling": (Measure("relative", "seconds a pixel (and tap), relative to the median", "{:.2f}", False),),
    "networks": (Measure("images_per_second", "images a second", "{:.1f}", False), MEMORY),
    "calls": (TIME,),
    "export": (TIME, MEMORY),
}
TITLES = {
    "ceiling": "What the device does at best",
    "attention": "Attention alone",
    "layer": "The whole layer",
    "kept": "A convolution, and attention that starts as it",
    "stem": "The paper's stem, and a ResNet's",
    "stages": "Attention alone in a ResNet-50's stages",
    "scaling": "Attention alone, forward: equal bars are linear",
    "networks": "Whole networks",
    "export": "Exported layers and networks",
    "calls": "What a call costs: 8 channels, 3x3, an image of 2x2 pixels, one thread",
}


def new_figure(title: str, machine: dict[str, Any], height: float) -> Figure:
    """An empty figure that names what was measured and where."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    figure.suptitle(f"{title}\n{described(machine)}", fontsize=10)
    return figure


def colour(name: str) -> str:
    """Ours, the convolution and all others."""
    return OURS if name.startswith("sasa") else CONVOLUTIONS if name.startswith(CONVOLUTION) else OTHERS


def log_limits(values: Sequence[float]) -> tuple[float, float]:
    """From a power of ten below all values to where there is room for the label of the largest."""
    return 10.0 ** math.floor(math.log10(min(values) / 1.5)), 5 * max(values)


def bars(panel: Axes, named: dict[str, tuple[str, Figures]], measure: Measure, title: str) -> None:
    """A bar for each name, with the lowest and highest turn if known."""
    values = []
    for place, (peer, figures) in enumerate(named.values()):
        value = figures.get(measure.key)
        if value is None:
            spot = {"transform": panel.get_yaxis_transform(), "va": "center"}
            panel.text(0.01, place, textwrap.shorten(figures.get("cannot", ""), 60), fontsize=7, style="italic", **spot)
            continue
        ends = [figures.get(f"{measure.key}_{end}", value) for end in ("lowest", "highest")]
        spread = [[value - ends[0]], [ends[1] - value]]
        bar = panel.barh(place, value, 0.75, xerr=spread, color=colour(peer), error_kw={"lw": 0.8, "capsize": 2})
        text = f"{milliseconds(figures)} ms" if measure.key == "seconds" else measure.form.format(value)
        panel.bar_label(bar, [text], padding=3, fontsize=8)
        values.append(value)
    panel.set_yticks(range(len(named)), list(named), fontsize=8)
    panel.set_ylim(len(named) - 0.4, -0.6)
    panel.tick_params(axis="x", labelsize=8)
    panel.set_title(f"{title}: {measure.label}" if title else measure.label, fontsize=9)
    if values and measure.log:
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter("")
        panel.set_xlim(log_limits(values))
    elif values:
        panel.set_xlim(0, 1.25 * max(values))


def measured(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the peers for which there was no time, and cases for which there was none at all; all if that is every
    case.
    """
    kept = [
        case | {"peers": {name: own for name, own in case["peers"].items() if own.get("cannot") != SKIPPED}}
        for case in cases
    ]
    return [case for case in kept if case["peers"]] or list(cases)


def figure(part: str, result: dict[str, Any]) -> Figure:
    """The plot of a part."""
    cases, measures = measured(result["cases"]), MEASURES[part]
    if all(len(case["peers"]) == 1 for case in cases):
        rows = [("", {case["case"]: next(iter(case["peers"].items())) for case in cases})]
    else:
        rows = [
            (case["case"], {name: (name, own) for name, own in case["peers"].items()}) for case in cases[:MOST_CASES]
        ]
    heights = [len(named) + 1.5 for _, named in rows]
    title = "A rehearsal: these figures mean nothing" if result.get("rehearsal") else TITLES[part]
    drawn = new_figure(title, result["machine"], 0.26 * sum(heights) + 1.4)
    panels = drawn.subplots(len(rows), len(measures), squeeze=False, height_ratios=heights)
    for (name, named), line in zip(rows, panels, strict=True):
        for panel, measure in zip(line, measures, strict=True):
            bars(panel, named, measure, name)
        for panel in line[1:]:
            panel.set_yticklabels([])
    return drawn


def draw(part: str, result: dict[str, Any], path: Path) -> None:
    """Write a part's plot as PNG."""
    figure(part, result).savefig(path, dpi=130)


HIGHLIGHTS = {
    "layer, forward": ("layer", "notebook forward", TIME),
    "layer, forward and backward, batch 8": ("layer", "notebook-batch8 training", TIME),
    "networks, batch 8, training step": (
        "networks",
        "batch 8 training step",
        Measure("images_per_second", "images per second", "{:.1f}", False),
    ),
}
"""Panels of the README's plot: part, case, and what the bars show."""


def draw_highlights(found: dict[str, Any], path: Path) -> None:
    """Write the README's plot."""
    panels = {}
    for title, (part, case, measure) in HIGHLIGHTS.items():
        (peers,) = [entry["peers"] for entry in found[part]["cases"] if entry["case"] == case]
        panels[title] = {name: (name, own) for name, own in peers.items() if not name.endswith("recompute")}, measure
    drawn = new_figure("The layer beside a convolution and other attention, float32", found["layer"]["machine"], 5.2)
    axes = drawn.subplots(len(panels), 1, height_ratios=[len(named) for named, _ in panels.values()])
    for panel, (title, (named, measure)) in zip(axes, panels.items(), strict=True):
        bars(panel, named, measure, title)
        panel.get_yticklabels()[0].set_fontweight("bold")
    drawn.savefig(path, dpi=110)
