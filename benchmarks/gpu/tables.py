"""The results of a GPU as tables, for the terminal and for the README."""

from __future__ import annotations

from typing import Any

from ..layer import CONVOLUTION
from ..tables import Result, Rows, markdown, targets
from .machine import in_words
from .results import SKIPPED
from .targets import FLEX

NOTHING = "Nothing has been measured on a GPU yet."
PICTURE = "![attention, layer and networks on a GPU](benchmarks/results/gpu.png)"
MODES = {"forward": "forward", "training": "forward and backward"}
HEADERS = {
    "attention": ["ms", "times sasa (lowest to highest)", "peak GB", "share of a copy", "share of a product"],
    "layer": ["ms", "times sasa (lowest to highest)", "peak GB"],
    "networks": ["images/s", "times sasa's ms (lowest to highest)", "peak GB", "M parameters"],
}
RIVALS = {"attention": FLEX, "layer": CONVOLUTION}  # whose times are shown stage by stage
TITLES = {"attention": "attention alone", "layer": "the whole layer", "networks": "whole networks"}


def share(figures: dict[str, Any], name: str) -> str:
    """A part of the best, in per cent."""
    return f"{figures[name]:.0%}" if name in figures else ""


def cells(part: str, figures: dict[str, Any]) -> list[str]:
    """A peer's figures."""
    ratio = ""
    if "ratio_to_sasa" in figures:
        spread = f"{figures['ratio_lowest']:.2f} to {figures['ratio_highest']:.2f}"
        ratio = f"{figures['ratio_to_sasa']:.2f} ({spread})"
    memory = f"{figures['peak_gigabytes']:.2f}" if "peak_gigabytes" in figures else ""
    if part == "networks":
        return [f"{figures['images_per_second']:.0f}", ratio, memory, f"{figures['parameters'] / 1e6:.1f}"]
    own = [f"{figures['milliseconds']:.3g}", ratio, memory]
    return [*own, share(figures, "copy_share"), share(figures, "product_share")] if part == "attention" else own


def is_stage(part: str, case: dict[str, Any]) -> bool:
    """Whether a case is a stage of a ResNet-50: those have a table of their own."""
    return part in RIVALS and case["case"][0].isdigit()


def compared(part: str, result: Result) -> Rows:
    """Peers by case; what the time did not reach is left out, what can't be done is said."""
    header, rows = ["case", "by", *HEADERS[part]], []
    for case in result[part]["cases"]:
        if is_stage(part, case):
            continue
        for name, figures in case["peers"].items():
            if figures.get("cannot") == SKIPPED:
                continue
            name = f"{name}, {figures['size']}x{figures['size']}" if figures.get("size", 224) != 224 else name
            if "cannot" in figures:
                row = [figures["cannot"][:80], *[""] * (len(HEADERS[part]) - 1)]
            else:
                row = cells(part, figures)
            rows.append([case["case"], name, *row])
    return Rows(f"{TITLES[part]} on a GPU", header, rows, 2)


def stages(part: str, result: Result) -> Rows:
    """A row a stage and precision: our time forward and in training, and how many times it the other takes."""
    rows: dict[tuple[str, str], list[str]] = {}
    for case in result[part]["cases"]:
        if not is_stage(part, case):
            continue
        precision = case["precision"]
        shape = case["case"].removesuffix(f" {precision} {case['mode']}")
        row = rows.setdefault((shape, precision), [""] * 4)
        ours, other = (case["peers"].get(name, {}) for name in ("sasa", RIVALS[part]))
        place = 2 * list(MODES).index(case["mode"])
        row[place] = f"{ours['milliseconds']:.3g}" if "milliseconds" in ours else "raises" if ours else ""
        row[place + 1] = f"{other['ratio_to_sasa']:.2f}" if "ratio_to_sasa" in other else ""
    header = ["stage", "precision"]
    for mode in MODES.values():
        header += [f"{mode}, ms", f"{RIVALS[part]}, times sasa"]
    return Rows(f"{TITLES[part]} in a ResNet-50's stages, batch 64", header, [[*k, *row] for k, row in rows.items()], 2)


def tables(result: Result) -> list[Rows]:
    """All that there are results for: targets, then part by part."""
    found = [targets(result, in_words(result["machine"]))._replace(caption="")] if "targets" in result else []
    for part in HEADERS:
        if part in result:
            found += [compared(part, result), *([stages(part, result)] if part in RIVALS else [])]
    return [table for table in found if table.rows]


def skipped(result: Result) -> int:
    """How many measurements the time did not reach."""
    cases = [case for part in HEADERS if part in result for case in result[part]["cases"]]
    return sum(figures.get("cannot") == SKIPPED for case in cases for figures in case["peers"].values())


def section(result: Result) -> str:
    """For the README: a sentence where nothing is measured."""
    if result.get("rehearsal", True):
        return NOTHING
    left = skipped(result)
    words = f"{in_words(result['machine'])}."
    if left:
        words += f" {left} measurements did not fit into the time of the run."
    return "\n\n".join([words, *(markdown(table) for table in tables(result)), PICTURE])
