"""The picture of docs/scale.md. A MODEL, NOT A MEASUREMENT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..plots import CONVOLUTION as TWIN
from ..plots import OURS
from .model import CONVOLUTION, MACHINES, SASA
from .tables import LABELS, Found

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHADES = {MACHINES[0].name: ("o", OURS), MACHINES[1].name: ("s", "tab:purple")}
HOURS = {24: "24 h", 10: "10 h", 1: "1 h", 1 / 6: "10 min", 1 / 60: "1 min"}


def efficiencies(panel: Axes, found: Found) -> None:
    """A line a machine and regime."""
    kinds = {"strong": ("-", "batch 4,096"), "synchronised": (":", "batch 4,096, batch norm over all GPUs")}
    kinds["weak"] = ("--", "128 images a GPU")
    for key, (line, words) in kinds.items():
        for name, (mark, shade) in SHADES.items():
            own = [one for one in found[key] if one["machine"] == name and one["network"] == SASA]
            gpus, values = [one["gpus"] for one in own], [one["efficiency"] for one in own]
            size = 6 if name == MACHINES[0].name else 3.5  # where lines agree both marks show
            label = f"{name.split()[0]}, {words}"
            panel.plot(gpus, values, mark + line, color=shade, ms=size, lw=1.3, label=label)
    panel.set_ylim(0, 1.05)
    panel.yaxis.set_major_formatter(lambda value, place: f"{value:.0%}")
    panel.set_title("Efficiency: images a second and GPU, in those of one GPU", fontsize=9)


def hours(panel: Axes, found: Found) -> None:
    """A line a machine and network."""
    for name, (mark, shade) in SHADES.items():
        for network, line in ((SASA, "-"), (CONVOLUTION, "--")):
            own = [one for one in found["strong"] if one["machine"] == name and one["network"] == network]
            gpus, values = [one["gpus"] for one in own], [one["hours"] for one in own]
            tint = shade if network == SASA else TWIN
            label = f"{name.split()[0]}, {LABELS[network]}"
            panel.plot(gpus, values, mark + line, color=tint, ms=4, lw=1.3, label=label)
            if network == SASA:
                ideal = "full attention, were efficiency 100%" if name == MACHINES[-1].name else None
                panel.plot(gpus, [values[0] / count for count in gpus], color="grey", lw=0.7, label=ideal)
    panel.set_yscale("log")
    panel.set_yticks(list(HOURS), list(HOURS.values()))
    panel.set_title("One run, batch 4,096", fontsize=9)


def figure(found: Found) -> Figure:
    """Efficiency, and hours of a run, against GPUs."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 5), layout="constrained")
    drawn.suptitle(
        "A MODEL, NOT A MEASUREMENT: sasa_resnet50 on ImageNet, 130 epochs\n"
        "machines as published, speed of attention assumed",
        fontsize=10,
    )
    panels = drawn.subplots(1, 2)
    efficiencies(panels[0], found)
    hours(panels[1], found)
    ticks = sorted({one["gpus"] for one in found["strong"]})
    for panel in panels:
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        panel.minorticks_off()
        panel.set_xlabel("GPUs", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=7, loc="lower left")
    return drawn


def draw(found: Found, path: Path) -> None:
    """Write it as PNG."""
    figure(found).savefig(path, dpi=130)
