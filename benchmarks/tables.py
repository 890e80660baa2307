"""The results as tables, for the terminal and for the README."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.table import Table

from .machine import in_words

Result = dict[str, Any]


class Rows(NamedTuple):
    """A table: the first ``words`` columns hold words, the others numbers. ``caption`` goes below it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    words: int
    caption: str = ""


def compared(part: str, result: Result) -> Rows:
    """Peers by case, of attention or of the layer."""
    rows = []
    for case in result["cases"]:
        for name, peer in case["peers"].items():
            if "cannot" in peer:
                rows.append([case["case"], name, "raises", "", ""])
                continue
            ratio = f"{peer['ratio_to_sasa']:.2f} ({peer['ratio_lowest']:.2f} to {peer['ratio_highest']:.2f})"
            rows.append([case["case"], name, f"{peer['seconds']:.3f}", ratio, f"{peer['peak_gigabytes']:.2f}"])
    header = ["case", "by", "seconds", "times sasa (lowest to highest)", "peak GB above the input"]
    titles = {"attention": "attention alone", "layer": "the whole layer", "kept": "a convolution as attention"}
    caption = f"{in_words(result['machine'])}, float32 unless named otherwise."
    if "import_seconds_after_torch" in result:
        caption += f" Importing sasa after torch takes {result['import_seconds_after_torch']['median']:.2f} s."
    return Rows(f"{titles[part]}: one call on the CPU", header, rows, 2, caption)


def stages(result: Result) -> Rows:
    """Throughput of every stage: a row a stage and batch, forward and training beside each other."""
    by_row: dict[tuple[str, str], dict[str, str]] = {}
    for entry in result["stages"]:
        spread = f"{entry['gflops']:.0f} ({entry['gflops_lowest']:.0f} to {entry['gflops_highest']:.0f})"
        by_row.setdefault((entry["stage"], str(entry["batch"])), {})[entry["mode"]] = spread
    rows = [[*place, modes["forward"], modes["training"]] for place, modes in by_row.items()]
    sgemm = result["sgemm"]["gflops"]
    caption = f"{in_words(result['machine'])}. Its matrix product: {sgemm:.0f} GFLOP/s."
    header = ["stage", "batch", "forward GFLOP/s (lowest to highest)", "training GFLOP/s (lowest to highest)"]
    return Rows("attention alone in a ResNet-50's stages", header, rows, 1, caption)


def scaling(result: Result) -> Rows:
    """Both series."""
    rows = []
    for name, series in result["series"].items():
        for point in series["points"]:
            shape = f"{point['size']}x{point['size']}, window {point['kernel_size']}"
            nanoseconds = f"{point['seconds_per_share'] * 1e9:.1f}"
            rows.append([name, shape, f"{point['seconds']:.4f}", nanoseconds, f"{point['relative']:.2f}"])
    header = ["in", "image", "seconds", "ns a pixel (and tap)", "relative to the median"]
    return Rows("is the forward pass linear?", header, rows, 2, in_words(result["machine"]))


def networks(result: Result) -> Rows:
    """Images a second and memory of every network."""
    rows = []
    for case in result["cases"]:
        for name, peer in case["peers"].items():
            spread = f"{peer['ratio_lowest']:.2f} to {peer['ratio_highest']:.2f}"
            label = name if peer["size"] == 224 else f"{name}, {peer['size']}x{peer['size']}"
            rows.append(
                [
                    case["case"],
                    label,
                    f"{peer['parameters'] / 1e6:.1f}",
                    f"{peer['images_per_second']:.1f}",
                    f"{peer['ratio_to_sasa']:.2f} ({spread})",
                    f"{peer['peak_gigabytes']:.2f}",
                ]
            )
    first = next(iter(result["cases"][0]["peers"]))
    header = ["case", "network", "M parameters", "images/s", f"times {first}'s seconds (lowest to highest)", "peak GB"]
    caption = f"{in_words(result['machine'])}, float32, channels_last, 224x224. Peak memory is above the network's own."
    return Rows("whole networks on the CPU", header, rows, 2, caption)


def calls(result: Result) -> Rows:
    """Microseconds of a call where there is next to nothing to compute."""
    rows = []
    for case in result["cases"]:
        for name, peer in case["peers"].items():
            ratio = f"{peer['ratio_to_convolution']:.2f} ({peer['ratio_lowest']:.2f} to {peer['ratio_highest']:.2f})"
            rows.append([case["case"], name, f"{peer['microseconds']:.0f}", ratio])
    header = ["call", "by", "µs", "times the convolution's (lowest to highest)"]
    caption = f"{in_words(result['machine'])}. 8 channels, 3x3, an image of 2x2 pixels, one thread."
    return Rows("what a call costs", header, rows, 2, caption)


def targets(result: Result, words: str = "") -> Rows:
    """Figure, target, and whether it is reached; ``words`` say where, if not those of a CPU."""
    rows = []
    for row in result["targets"]:
        value, limit = "not measured", f"{'≥' if row['at_least'] else '≤'} {row['limit']:g}"
        if row["value"] is not None:
            value = f"{row['value']:.2f}"
        if row["lowest"] is not None:
            value += f" ({row['lowest']:.2f} to {row['highest']:.2f})"
        rows.append([row["name"], value, limit, {True: "yes", False: "no", None: ""}[row["reached"]]])
    header = ["figure", "value (lowest to highest)", "target", "reached"]
    return Rows("targets", header, rows, 1, words or in_words(result["machine"]))


ROWS = {
    "attention": lambda result: compared("attention", result),
    "layer": lambda result: compared("layer", result),
    "kept": lambda result: compared("kept", result),
    "stages": stages,
    "scaling": scaling,
    "networks": networks,
    "calls": calls,
    "targets": targets,
}


def rich(table: Rows) -> Table:
    """For the terminal."""
    drawn = Table(title=table.title, caption=table.caption)
    for index, column in enumerate(table.header):
        drawn.add_column(column, justify="left" if index < table.words else "right")
    for index, row in enumerate(table.rows):
        below = table.rows[index + 1] if index + 1 < len(table.rows) else row
        drawn.add_row(*row, end_section=table.words > 1 and below[0] != row[0])
    return drawn


def markdown(table: Rows) -> str:
    """For the README."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return text.replace("| --- ", "|---").replace("|--- |", "|---|") + (f"\n\n{table.caption}" if table.caption else "")
