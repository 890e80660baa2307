"""The results as tables in markdown, for the terminal and for docs/."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

from .ceiling import COPY
from .machine import described
from .results import SKIPPED, Figures
from .targets import Found, Value, evaluate, peers_of


class Listing(NamedTuple):
    """A table: the first ``words`` columns hold words, the others numbers. ``caption`` goes below it."""

    header: list[str]
    rows: list[list[str]]
    caption: str = ""
    words: int = 2


class Column(NamedTuple):
    """A header, and the format of figures below it; "" for missing ones."""

    header: str
    cell: Callable[[Figures], str]


def number(name: str, form: str = "{:.2f}", factor: float = 1.0) -> Callable[[Figures], str]:
    """One of the figures, with its lowest and highest in brackets if there are any."""

    def cell(figures: Figures) -> str:
        if name not in figures:
            return ""
        ends = [figures.get(f"{name}_{end}") for end in ("lowest", "highest")]
        spread = "" if None in ends else f" ({' to '.join(form.format(factor * end) for end in ends)})"  # type: ignore[operator]
        return form.format(factor * figures[name]) + spread

    return cell


def milliseconds(figures: Figures) -> str:
    """Of the median turn."""
    if "seconds" not in figures:
        return ""
    value = 1e3 * figures["seconds"]
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


TIME = Column("ms", milliseconds)
RATIO = Column("times sasa (lowest to highest)", number("ratio"))
MEMORY = Column("peak GB above the input", number("peak_gigabytes"))
SPEED = Column("GFLOP/s (lowest to highest)", number("gflops", "{:.0f}"))
COLUMNS = {
    "ceiling": (SPEED, Column("GB/s (lowest to highest)", number("gigabytes_per_second", "{:.0f}"))),
    "attention": (TIME, RATIO, MEMORY),
    "layer": (TIME, RATIO, MEMORY),
    "kept": (TIME, RATIO, MEMORY),
    "stem": (TIME, Column("times the convolution stem (lowest to highest)", number("ratio")), MEMORY),
    "stages": (SPEED, RATIO),
    "scaling": (
        TIME,
        Column("ns a pixel (and tap)", number("seconds_per_share", "{:.1f}", 1e9)),
        Column("relative to the median", number("relative")),
    ),
    "networks": (
        Column("M parameters", number("parameters", "{:.1f}", 1e-6)),
        Column("images/s", number("images_per_second", "{:.1f}")),
        Column("times sasa_resnet50_convstem's time (lowest to highest)", number("ratio")),
        Column("peak GB", number("peak_gigabytes")),
    ),
    "export": (TIME, RATIO, MEMORY),
    "calls": (
        Column("µs", number("seconds", "{:.0f}", 1e6)),
        Column("times the convolution's (lowest to highest)", number("ratio")),
    ),
}


def part_table(part: str, found: Found) -> Listing:
    """Peers by case; those skipped for lack of time are omitted, those that can't run are reported."""
    result, columns = found[part], list(COLUMNS[part])
    if part in ("attention", "stages"):
        columns += shares(found)
    rows = []
    for case in result["cases"]:
        for peer, figures in case["peers"].items():
            if figures.get("cannot") == SKIPPED:
                continue
            name = f"{peer}, {figures['size']}x{figures['size']}" if figures.get("size", 224) == 256 else peer
            cells = [column.cell(figures | {"precision": case.get("precision")}) for column in columns]
            if "cannot" in figures:
                cells = [textwrap.shorten(figures["cannot"], 80), *[""] * (len(columns) - 1)]
            rows.append([case["case"], name, *cells])
    full = [index for index in range(len(columns)) if any(row[2 + index] for row in rows)]
    rows = [[*row[:2], *(row[2 + index] for index in full)] for row in rows]
    caption = f"{described(result['machine'])}."
    left = sum(f.get("cannot") == SKIPPED for case in result["cases"] for f in case["peers"].values())
    caption += f" {left} measurements did not fit into the time of the run." if left else ""
    return Listing(["case", "by", *(columns[index].header for index in full)], rows, caption)


def shares(found: Found) -> list[Column]:
    """Bandwidth and throughput as shares of what a copy and a product reach on a GPU."""

    def of(name: str, case: Callable[[Figures], str], peer: str) -> Callable[[Figures], str]:
        def cell(figures: Figures) -> str:
            try:
                return f"{figures[name] / peers_of(found, 'ceiling', case(figures))[peer][name]:.0%}"
            except KeyError:
                return ""

        return cell

    by_copy = of("gigabytes_per_second", lambda figures: COPY, COPY)
    by_product = of("gflops", lambda figures: f"product {figures['precision']}", "matrix product")
    return [Column("share of a copy", by_copy), Column("share of a product", by_product)]


def limit_words(at_least: bool, limit: float) -> str:
    """The targets."""
    return f"{'≥' if at_least else '≤'} {limit:g}"


def value_words(value: Value | None) -> str:
    """A figure with its spread."""
    if value is None:
        return "not measured"
    middle, *ends = value
    return f"{middle:.2f}" + ("" if None in ends else f" ({ends[0]:.2f} to {ends[1]:.2f})")


def targets_table(found: Found, device: str, narrow: Found | None = None) -> Listing:
    """The targets, what was measured, and whether they are reached; ``narrow``: results with narrower vectors, for a
    column of their own.
    """
    rows = [
        [
            target.name,
            limit_words(target.at_least, target.limit),
            value_words(value),
            "" if value is None else "yes" if target.reached(value[0]) else "no",
        ]
        for target, value in evaluate(found, device)
    ]
    by_machine: dict[str, list[str]] = {}
    for part in ("attention", "layer", "stem", "stages", "scaling", "networks"):
        if part in found:
            by_machine.setdefault(described(found[part]["machine"]), []).append(part)
    lines = by_machine if len(by_machine) == 1 else [f"{', '.join(own)}: {name}" for name, own in by_machine.items()]
    header = ["figure", "to reach", "measured (lowest to highest)", "reached"]
    if narrow:
        header.append(next(iter(narrow.values()))["machine"]["capability"])
        for row, (_, value) in zip(rows, evaluate(narrow, device), strict=True):
            row.append("" if value is None else value_words(value))
    return Listing(header, rows, f"{'; '.join(lines)}.", 1)


def markdown(table: Listing) -> str:
    """In GitHub's format."""
    rules = ["---" if index < table.words else "---:" for index in range(len(table.header))]
    lines = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in (table.header, *table.rows)]
    text = "\n".join(f"| {line} |" for line in lines)
    first, _, rest = text.partition("\n")
    return f"{first}\n|{'|'.join(rules)}|\n{rest}" + (f"\n\n{table.caption}" if table.caption else "")


def demo_table(runs: list[dict[str, Any]]) -> Listing:
    """What ``make demo`` trained."""
    rows = [
        [
            run["model"],
            f"{run['top1']:.1%}",
            f"{run['parameters']:,}",
            f"{run['flops'] / 1e6:.2f}",
            f"{run['seconds_per_epoch']:.1f}",
        ]
        for run in runs
    ]
    return Listing(["network", "top-1", "parameters", "MFLOPs per image", "seconds per epoch"], rows, words=1)


# For the README: words, and what is shown of which case next to which peer.
HIGHLIGHTS = (
    ("layer, forward", "layer", "notebook forward"),
    ("layer, forward and backward", "layer", "notebook training"),
    ("layer, forward and backward, batch 8", "layer", "notebook-batch8 training"),
    ("SASA-ResNet-50 with convolution stem, forward", "networks", "batch 8 forward"),
    ("the same, training step", "networks", "batch 8 training step"),
)


def highlights(found: Found) -> Listing:
    """Five rows."""
    rows = []
    for words, part, case in HIGHLIGHTS:
        peers = peers_of(found, part, case)
        others = ("convolution 3x3", "timm HaloAttn", "unfold")
        if part == "networks":
            others = ("torchvision resnet50", "timm halonet50ts", "")
        own = next(iter(peers.values()))
        cells = [f"{peers[name]['ratio']:.2f}" if name in peers else "" for name in others]
        rows.append([words, f"{milliseconds(own)} ms", *cells])
    header = ["", "sasa", "convolution, times as long", "halo attention", "`unfold`"]
    return Listing(header, rows, f"{described(found['layer']['machine'])}.", 1)
