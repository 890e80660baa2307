"""The results as pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .machine import in_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]

OURS, OTHERS, CONVOLUTION = "tab:blue", "tab:orange", "tab:green"


def new_figure(title: str, result: Result, height: float) -> Figure:
    """An empty figure that says what was measured and where."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    figure.suptitle(f"{title}\n{in_words(result['machine'])}", fontsize=10)
    return figure


def colour(name: str) -> str:
    """Ours, the convolution and all others."""
    return OURS if name.startswith("sasa") else CONVOLUTION if name.startswith("convolution") else OTHERS


def log_limits(values: Sequence[float]) -> tuple[float, float]:
    """From a power of ten below all values to where the label of the largest has room."""
    return 10.0 ** math.floor(math.log10(min(values) / 1.5)), 5 * max(values)


def compared(part: str, result: Result) -> Figure:
    """Bars of seconds and of memory: a row of panels a case, a bar a peer."""
    cases = result["cases"]
    heights = [len(case["peers"]) + 1.5 for case in cases]
    titles = {
        "attention": "Attention alone",
        "layer": "The whole layer",
        "kept": "A convolution, and attention that starts as it",
    }
    figure = new_figure(f"{titles[part]}: one call on the CPU", result, 0.26 * sum(heights) + 1.4)
    panels = figure.subplots(len(cases), 2, squeeze=False, height_ratios=heights, sharex="col")
    measures = (("seconds", "{:.3g} s", "seconds"), ("peak_gigabytes", "{:.2f} GB", "peak GB above the input"))
    for case, row in zip(cases, panels, strict=True):
        for panel, (key, form, label) in zip(row, measures, strict=True):
            names = list(case["peers"])
            values = [case["peers"][name].get(key) for name in names]
            for place, (name, value) in enumerate(zip(names, values, strict=True)):
                if value is not None:
                    bar = panel.barh(place, value, 0.75, color=colour(name))
                    panel.bar_label(bar, [form.format(value)], padding=3, fontsize=8)
                else:
                    spot = {"transform": panel.get_yaxis_transform(), "va": "center"}
                    panel.text(0.01, place, "raises", fontsize=8, style="italic", **spot)
            panel.set_yticks(range(len(names)), names if key == "seconds" else [""] * len(names), fontsize=8)
            panel.set_ylim(len(names) - 0.4, -0.6)
            panel.set_xscale("log")
            panel.xaxis.set_minor_formatter("")
            panel.tick_params(axis="x", labelsize=8, labelbottom=True)
            panel.set_title(
                f"{case['case']}, batch {case['batch']}, {case['size']}x{case['size']}: {label}", fontsize=9
            )
    for panel, (key, *_) in zip(panels[0], measures, strict=True):  # for the rows below as well
        panel.set_xlim(log_limits([peer[key] for case in cases for peer in case["peers"].values() if key in peer]))
    return figure


def stages(result: Result) -> Figure:
    """Bars of GFLOP/s, a group a stage; the matrix product's as a line."""
    figure = new_figure("Attention alone in a ResNet-50's stages, heads 8, window 7, float32", result, 4.2)
    panel = figure.subplots()
    entries = result["stages"]
    names = list(dict.fromkeys(entry["stage"] for entry in entries))
    kinds = sorted({(entry["mode"], entry["batch"]) for entry in entries}, key=lambda kind: (kind[0], -kind[1]))
    width = 0.8 / len(kinds)
    for index, kind in enumerate(kinds):
        own = [entry for entry in entries if (entry["mode"], entry["batch"]) == kind]
        values = [entry["gflops"] for entry in own]
        ends = [[e["gflops"] - e["gflops_lowest"] for e in own], [e["gflops_highest"] - e["gflops"] for e in own]]
        places = [names.index(entry["stage"]) + width * (index - (len(kinds) - 1) / 2) for entry in own]
        shade = {"color": f"C{index}", "label": f"{kind[0]}, batch {kind[1]}"}
        bars = panel.bar(places, values, 0.92 * width, yerr=ends, error_kw={"lw": 0.8, "capsize": 2}, **shade)
        panel.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    sgemm = result["sgemm"]["gflops"]
    panel.axhline(sgemm, color="black", lw=1, ls="--", label=f"matrix product: {sgemm:.0f} GFLOP/s")
    panel.set_xticks(range(len(names)), [f"{name} a head" for name in names])
    panel.set(ylabel="GFLOP/s (4·k²·D FLOPs a query, training 3.5 times)")
    panel.yaxis.label.set_fontsize(8)
    panel.margins(y=0.1)
    figure.legend(loc="outside lower center", fontsize=8, ncols=len(kinds) + 1)
    return figure


def scaling(result: Result) -> Figure:
    """Lines: seconds a pixel, and a pixel and tap, relative to the median; flat is linear."""
    figure = new_figure("Attention alone, forward, float32: flat is linear", result, 4)
    keys = {
        "pixels": ("size", "pixels along a side (window {kernel_size}, {heads})", "seconds a pixel"),
        "taps": ("kernel_size", "taps along a side of the window ({size}x{size}, {heads})", "seconds a tap"),
    }
    for panel, (name, (key, axis, what)) in zip(figure.subplots(1, 2, sharey=True), keys.items(), strict=True):
        points = result["series"][name]["points"]
        panel.axhspan(0.85, 1.15, color="tab:green", alpha=0.15, label="within 15% of the median")
        sizes, values = [point[key] for point in points], [point["relative"] for point in points]
        panel.plot(sizes, values, "o-", color=OURS, label="sasa")
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, sizes, fontsize=8)
        panel.minorticks_off()
        panel.set_ylim(
            0, max(2, 1.1 * max(point["relative"] for s in result["series"].values() for point in s["points"]))
        )
        heads = "{num_heads} heads of {head_width}, batch {batch}".format_map(points[0])
        panel.set_xlabel(axis.format_map(points[0] | {"heads": heads}), fontsize=8)
        panel.set_ylabel(f"{what}, relative to the median", fontsize=8)
        panel.tick_params(axis="y", labelleft=True, labelsize=8)
        panel.legend(fontsize=8, loc="lower left")
    return figure


def networks(result: Result) -> Figure:
    """Points: images a second against parameters, a panel for forward and one for training; depths joined by lines."""
    figure = new_figure("Whole networks, 224x224, batch 8, float32, channels_last", result, 4.6)
    cases = [case for case in result["cases"] if case["batch"] == 8 and case["mode"] != "folded"] or result["cases"]
    families = {
        "convolution": ("sasa_resnet26_conv", "sasa_resnet38_conv", "timm resnet50"),
        "attention, convolution stem": tuple(f"sasa_resnet{depth}_convstem" for depth in (26, 38, 50)),
        "full attention": tuple(f"sasa_resnet{depth}" for depth in (26, 38, 50)),
    }
    shades = {"convolution": CONVOLUTION, "attention, convolution stem": OURS, "full attention": "tab:purple"}
    for panel, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        placed = set()
        for family, names in families.items():
            found = [name for name in names if name in case["peers"]]
            points = [(case["peers"][n]["parameters"] / 1e6, case["peers"][n]["images_per_second"]) for n in found]
            placed |= set(found)
            if points:
                panel.plot(*zip(*points, strict=True), "o-", color=shades[family], label=family)
            for name, point in zip(found, points, strict=True):
                depth = name.removesuffix("_convstem").removesuffix("_conv")[-2:]
                panel.annotate(depth, point, (5, 5), textcoords="offset points", fontsize=8)
        for name in case["peers"].keys() - placed:
            peer = case["peers"][name]
            point = peer["parameters"] / 1e6, peer["images_per_second"]
            panel.plot(*point, "s", color=OTHERS)
            size = "" if peer["size"] == 224 else f" ({peer['size']}x{peer['size']})"
            panel.annotate(name + size, point, (-5, -12), textcoords="offset points", fontsize=8, ha="right")
        panel.set(xlabel="million parameters", ylabel="images a second", title=case["case"])
        panel.margins(0.12)
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=8, loc="upper right")
    return figure


def calls(result: Result) -> Figure:
    """Bars of the microseconds of a call."""
    figure = new_figure("what a call costs: 8 channels, 3x3, an image of 2x2 pixels, one thread", result, 3)
    panels = figure.subplots(1, len(result["cases"]), squeeze=False)[0]
    for panel, case in zip(panels, result["cases"], strict=True):
        names = list(case["peers"])
        times = [case["peers"][name]["microseconds"] for name in names]
        bars = panel.barh(names, times, color=[CONVOLUTION if "convolution" in name else OURS for name in names])
        panel.bar_label(bars, [f"{time:.0f}" for time in times], padding=3, fontsize=8)
        panel.set(xlabel="microseconds a call", title=case["case"])
        panel.invert_yaxis()
        panel.margins(x=0.15)
    return figure


PLOTS: dict[str, Callable[[Result], Figure]] = {
    "attention": lambda result: compared("attention", result),
    "layer": lambda result: compared("layer", result),
    "kept": lambda result: compared("kept", result),
    "stages": stages,
    "scaling": scaling,
    "networks": networks,
    "calls": calls,
}


def draw(part: str, result: Result, path: Path) -> None:
    """Write a part's picture as PNG."""
    PLOTS[part](result).savefig(path, dpi=130)
