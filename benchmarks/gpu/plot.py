"""The results of a GPU as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plots import colour, log_limits
from .machine import in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_CASES = 4  # of a part: those measured first
MEASURES = {
    "attention": ("milliseconds", "{:.3g} ms", "attention alone, ms"),
    "layer": ("milliseconds", "{:.3g} ms", "the whole layer, ms"),
    "networks": ("images_per_second", "{:.0f}", "images a second"),
}


def bars(panel: Axes, case: dict[str, Any], part: str) -> None:
    """A bar a peer, with the lowest and highest turn."""
    key, form, what = MEASURES[part]
    names = list(case["peers"])
    for place, name in enumerate(names):
        figures = case["peers"][name]
        value = figures.get(key)
        if value is None:
            spot = {"transform": panel.get_yaxis_transform(), "va": "center"}
            panel.text(0.01, place, figures["cannot"][:50], fontsize=7, style="italic", **spot)
            continue
        ends = [[value - figures[f"{key}_lowest"]], [figures[f"{key}_highest"] - value]]
        bar = panel.barh(place, value, 0.75, xerr=ends, color=colour(name), error_kw={"lw": 0.8, "capsize": 2})
        panel.bar_label(bar, [form.format(value)], padding=3, fontsize=8)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.tick_params(axis="x", labelsize=8)
    panel.set_title(f"{case['case']}: {what}", fontsize=9)
    values = [figures[key] for figures in case["peers"].values() if key in figures]
    if not values:
        return
    if part == "networks":
        panel.set_xlim(0, 1.35 * max(values))
    else:
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter("")
        panel.set_xlim(log_limits(values))


def figure(result: dict[str, Any]) -> Figure:
    """A panel for each of the first cases of every part."""
    from matplotlib.figure import Figure

    chosen = [(part, case) for part in MEASURES for case in result.get(part, {"cases": []})["cases"][:MOST_CASES]]
    drawn = Figure(figsize=(11, 2.2 * max(1, (len(chosen) + 1) // 2) + 0.8), layout="constrained")
    title = "A rehearsal: these figures mean nothing" if result.get("rehearsal") else "sasa and others on a GPU"
    drawn.suptitle(f"{title}\n{in_words(result['machine'])}", fontsize=10)
    if not chosen:
        return drawn
    panels = drawn.subplots((len(chosen) + 1) // 2, 2, squeeze=False).flat
    for panel, (part, case) in zip(panels, chosen, strict=False):
        bars(panel, case, part)
    for panel in list(panels)[len(chosen) :]:
        panel.set_axis_off()
    return drawn


def draw(result: dict[str, Any], path: Path) -> None:
    """Write it as PNG."""
    figure(result).savefig(path, dpi=130)
