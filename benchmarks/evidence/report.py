"""The committed results as the tables and plots of docs/evidence.md.

python -m benchmarks.evidence.report     # the pictures; python -m benchmarks.readme fills in the tables
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sasa.study.gather import welch
from sasa.study.machine import machine_line

from ..machine import ROOT
from ..plots import CONVOLUTIONS, OURS
from ..tables import Listing, markdown
from .networks import NETWORKS, name_of

RESULTS = Path(__file__).parent / "results"
PICTURES = ROOT / "docs/evidence"
NAMES = {"fashion": "Fashion-MNIST", "cifar": "CIFAR-10"}
BASE = "convolution stem + attention"
"""The base of the variants."""

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = dict[str, Any]


def read(name: str) -> dict[str, Any] | None:
    """A result file, or None if there is none yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def cells(name: str) -> dict[str, Cell]:
    """A study's cells by the network's name and, in words, whatever else it varies; those with a result."""
    found = read(name)
    named = {}
    for cell in found["cells"] if found else []:
        options = dict(cell["options"])
        network = options.pop("model_options", None)
        words = [] if network is None else [name_of(network)]
        words += [f"{key} {value:g}" for key, value in options.items()]
        if cell["n"]:
            named[", ".join(words)] = cell
    return named


def accuracy(cell: Cell | None) -> str:
    """Per cent, mean ± deviation (seeds)."""
    if cell is None:
        return ""
    spread = cell["standard_deviation"]
    return f"{cell['mean']:.1%}" + ("" if spread is None else f" ± {spread:.1%}") + f" ({cell['n']})"


def difference(first: Cell | None, second: Cell | None) -> str:
    """Points, first minus second, ± standard error; in bold if it is more than seeds explain."""
    if first is None or second is None:
        return ""
    found = welch(first, second)
    text = f"{100 * found['difference']:+.1f}"
    if found["standard_error"] is None:
        return text
    text += f" ± {100 * found['standard_error']:.1f}"
    return f"**{text}**" if abs(found["difference"]) > (found["chance"] or 1) else text


def networks() -> Listing:
    """Accuracy, parameters, FLOPs, time and memory of the compared networks."""
    cost, rows = read("cost") or {}, []
    for data, title in NAMES.items():
        for width, study in (("0.5", data), ("1.0", f"widths-{data}")):
            found = cells(study)
            for name in NETWORKS:
                cell, costs = found.get(name), cost.get(data, {}).get(width, {}).get(name, {})
                if cell is None:
                    continue
                figures = [f"{cell['parameters']:,.0f}", f"{cell['flops'] / 1e6:.1f}"]
                keys = ("forward_ms_per_image", "training_ms_per_image", "training_memory_mb")
                figures += [f"{costs[key]:.3g}" if costs else "" for key in keys]
                than = "" if name == "convolution" else difference(cell, found.get("convolution"))
                rows.append([title, width, name, accuracy(cell), than, *figures])
    header = ["images", "width", "network", "top-1 (seeds)", "less convolution's, points"]
    header += ["parameters", "MFLOPs", "ms per image, forward", "training", "MB, training"]
    return Listing(header, rows, words=3)


def variants(studies: dict[str, tuple[str, ...]], names: Callable[[str], bool]) -> Listing:
    """Variants of the base, by data set: accuracy and difference from the base's."""
    found = {data: {k: c for study in those for k, c in cells(study).items()} for data, those in studies.items()}
    rows = []
    for name in dict.fromkeys(name for of_data in found.values() for name in of_data if names(name)):
        row = [name]
        for of_data in found.values():
            row += [
                accuracy(of_data.get(name)),
                "" if name == BASE else difference(of_data.get(name), of_data.get(BASE)),
            ]
        rows.append(row)
    header = ["attention behind a convolutional stem"]
    for data in found:
        header += [f"{NAMES[data]}, top-1 (seeds)", "points"]
    return Listing(header, rows, words=1)


def start() -> Listing:
    """How heads start."""
    return variants({d: (d,) for d in NAMES}, lambda name: name == BASE or name.startswith("start"))


def ablations() -> Listing:
    """Position, split, border, window."""
    studies = {data: (data, f"ablations-{data}") for data in NAMES}
    return variants(studies, lambda name: name == BASE or name.split()[0] in VARIED)


VARIED = ("position", "position_split", "border", "kernel_size")

SIZES = {2_000: "data-2000", 5_000: "fashion", 10_000: "data-10000", 20_000: "data-20000"}


def data() -> Listing:
    """Accuracy by number of images, at an equal number of steps."""
    rows = []
    for size, study in SIZES.items():
        found = cells(study)
        pair = [found.get(name) for name in ("convolution", BASE)]
        if any(pair):
            rows.append([f"{size:,}", *map(accuracy, pair), difference(pair[1], pair[0])])
    return Listing(["images", "convolution", "attention", "points"], rows, words=1)


def recipe() -> Listing:
    """What else may close the gap."""
    base, rows = cells("fashion"), []
    for words, study in (
        ("as above", "fashion"),
        ("learning rate 0.01", "rate-fashion"),
        ("no label smoothing", "smoothing-fashion"),
        ("20 epochs", "length-fashion"),
    ):
        found = cells(study)
        pair = [found.get(name) for name in ("convolution", BASE)]
        if any(pair):
            rows.append([words, *map(accuracy, pair), difference(pair[1], pair[0])])
    for name, cell in cells("embeddings-fashion").items():
        rows.append([name.replace("_", " "), "", accuracy(cell), difference(cell, base.get("convolution"))])
    return Listing(["training", "convolution", "attention", "attention less convolution, points"], rows, words=1)


def whole() -> Listing:
    """All images, full width, six epochs."""
    found = cells("whole-fashion")
    rows = [
        [
            name,
            accuracy(found[name]),
            "" if name == "convolution" else difference(found[name], found["convolution"]),
            f"{found[name]['parameters']:,.0f}",
            f"{found[name]['flops'] / 1e6:.1f}",
        ]
        for name in NETWORKS
        if name in found
    ]
    return Listing(["network", "top-1 (seeds)", "less convolution's, points", "parameters", "MFLOPs"], rows, words=1)


def tuning() -> Listing:
    """Accuracy on held-out training images by learning rate."""
    found = read("tune-fashion") or {"cells": []}
    rows: dict[str, list[str]] = {}
    rates: dict[str, None] = {}
    for cell in found["cells"]:
        rates[f"{cell['options']['learning_rate']:g}"] = None
        rows.setdefault(name_of(cell["options"]["model_options"]), []).append(accuracy(cell))
    return Listing(["learning rate", *rates], [[name, *values] for name, values in rows.items()], words=1)


def robustness() -> Listing:
    """Accuracy on changed images: what is left of each network's own accuracy."""
    found, rows = read("robustness") or {}, []
    for name, title in NAMES.items():
        of_data = found.get(name, {})
        for change in next(iter(next(iter(of_data.values()), {}).values()), {}):
            row = [title, change]
            for network in NETWORKS:
                values = [of_seed[change] for of_seed in of_data.get(network, {}).values()]
                spread = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
                row.append(f"{statistics.mean(values):.1%}{spread}" if values else "")
            rows.append(row)
    return Listing(["images", "change", *NETWORKS], rows, words=2)


def times() -> Listing:
    """How long every study's trainings took."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        found = read(path.stem) or {}
        own = [cell for cell in found.get("cells", []) if cell["n"]]
        if not own:
            continue
        epochs = found["plan"]["recipe"]["epochs"]
        each = [epochs * cell["seconds_per_epoch"] / 60 for cell in own]
        whole = sum(minutes * cell["n"] for minutes, cell in zip(each, own, strict=True))
        ends = f"{min(each):.1f}" if len(each) == 1 else f"{min(each):.1f} to {max(each):.1f}"
        rows.append([path.stem, found["title"], f"{sum(cell['n'] for cell in own)}", ends, f"{whole:.0f}"])
    return Listing(["plan", "what", "trainings", "minutes each", "in all"], rows, words=2)


TABLES = {
    "networks": networks,
    "start": start,
    "ablations": ablations,
    "data": data,
    "recipe": recipe,
    "whole": whole,
    "times": times,
    "tuning": tuning,
    "robustness": robustness,
}


def table(name: str) -> str:
    """One of the page's tables."""
    return markdown(TABLES[name]())


def draw_networks(path: Path) -> None:
    """Accuracy against FLOPs and against parameters."""
    figure = new_figure("Attention and convolution on 5,000 images", 6.4)
    panels = figure.subplots(2, 2, sharey="row")
    shades = dict(zip(NETWORKS, (CONVOLUTIONS, "tab:olive", OURS, "tab:purple"), strict=True))
    for row, (images, title) in zip(panels, NAMES.items(), strict=True):
        found = [cells(images), cells(f"widths-{images}")]
        for panel, key, unit, label in zip(row, ("flops", "parameters"), (1e6, 1e3), AXES, strict=True):
            for name, marker in zip(NETWORKS, "sD^o", strict=True):
                own = [of_width[name] for of_width in found if name in of_width]
                if own:
                    values = ([cell[key] / unit for cell in own], [100 * cell["mean"] for cell in own])
                    spread = [100 * (cell["standard_deviation"] or 0) for cell in own]
                    panel.errorbar(*values, spread, marker=marker, color=shades[name], capsize=3, label=name)
            panel.set(xlabel=label)
            panel.grid(alpha=0.25)
        row[0].set_ylabel(f"{title}, top-1, %")
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


AXES = ("MFLOPs per image", "thousands of parameters")


def draw_variants(path: Path) -> None:
    """Every variant's difference from the base, with 95 % intervals."""
    figure = new_figure(f"Variants of {BASE}: points more or less", 5.6)
    panel = figure.subplots()
    names: dict[str, None] = {}
    for shift, (images, title) in enumerate(NAMES.items()):
        found = cells(images) | cells(f"ablations-{images}")
        base = found.get(BASE)
        for name, cell in found.items():
            if base is None or name in (BASE, "full attention"):
                continue
            names.setdefault(name)
            other = welch(cell, base)
            place, color = list(names).index(name) + 0.2 * shift, ("tab:blue", "tab:orange")[shift]
            label = title if name == "convolution" else None
            bar = None if other["chance"] is None else 100 * other["chance"]
            panel.errorbar(100 * other["difference"], place, xerr=bar, fmt="o", color=color, capsize=3, label=label)
    panel.axvline(0, color="0.5", lw=1)
    panel.set_yticks(range(len(names)), list(names))
    panel.invert_yaxis()
    panel.set(xlabel="difference in top-1, points, with its 95 % interval")
    panel.grid(alpha=0.25, axis="x")
    panel.legend()
    figure.savefig(path, dpi=130)


def draw_data(path: Path) -> None:
    """Accuracy by number of images."""
    figure = new_figure("Fashion-MNIST: about 800 steps on more or fewer images", 3.8)
    panel = figure.subplots()
    for name, shade, mark in (("convolution", CONVOLUTIONS, "s--"), (BASE, OURS, "o-")):
        own = {size: found[name] for size, study in SIZES.items() if name in (found := cells(study))}
        means, spread = ([100 * (c[key] or 0) for c in own.values()] for key in ("mean", "standard_deviation"))
        panel.errorbar(list(own), means, spread, fmt=mark, color=shade, capsize=3, label=name)
    panel.set_xscale("log")
    panel.set_xticks(list(SIZES), [f"{size:,}" for size in SIZES])
    panel.minorticks_off()
    panel.set(xlabel="training images", ylabel="top-1 on the 10,000 test images, %")
    panel.grid(alpha=0.25)
    panel.legend()
    figure.savefig(path, dpi=130)


def new_figure(title: str, height: float) -> Figure:
    """An empty figure that names what was trained and where."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    where = (read("fashion") or {"machines": []})["machines"]
    figure.suptitle("\n".join((title, *map(machine_line, where[:1]))), fontsize=10)
    return figure


def main() -> None:
    """Draw all."""
    PICTURES.mkdir(exist_ok=True)
    for name, draw in (("networks", draw_networks), ("variants", draw_variants), ("data", draw_data)):
        draw(PICTURES / f"{name}.png")
    print(f"wrote {PICTURES}")


if __name__ == "__main__":
    main()
