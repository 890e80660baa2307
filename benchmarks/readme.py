"""Writes the README's tables from the committed results: ``python -m benchmarks.readme``."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def demo_table() -> str:
    """Rows of docs/demo/results.json."""
    lines = ["| network | top-1 | parameters | MFLOPs an image | seconds an epoch |", "|---|---|---|---|---|"]
    for run in json.loads((ROOT / "docs/demo/results.json").read_text()):
        figures = f"{run['top1']:.1%} | {run['parameters']:,} | {run['flops'] / 1e6:.2f}"
        lines.append(f"| {run['model']} | {figures} | {run['seconds_per_epoch']:.1f} |")
    return "\n".join(lines)


def layer_table() -> str:
    """Rows of benchmarks/results/layer-cpu.json."""
    results = json.loads((ROOT / "benchmarks/results/layer-cpu.json").read_text())
    lines = ["| case | layer | seconds | times sasa (lowest to highest) | peak GB above the input |"]
    lines.append("|---|---|---|---|---|")
    for case in results["cases"]:
        for name, layer in case["layers"].items():
            ratio = f"{layer['ratio_to_sasa']:.2f} ({layer['ratio_lowest']:.2f} to {layer['ratio_highest']:.2f})"
            figures = f"{layer['seconds']:.3f} | {ratio} | {layer['peak_gigabytes']:.2f}"
            lines.append(f"| {case['problem']} {case['mode']} | {name} | {figures} |")
    where = results["machine"]
    seconds = results["import_seconds_after_torch"]["median"]
    lines.append("")
    lines.append(
        f"{where['cpu']} ({where['capability']}), {where['threads']} threads, PyTorch {where['torch']}, float32. "
        f"Importing sasa after torch takes {seconds:.2f} s."
    )
    return "\n".join(lines)


def main() -> None:
    """Put the tables between their marks."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    for mark, table in (("demo", demo_table()), ("layer", layer_table())):
        begin, end = f"<!-- {mark} table -->\n", "<!-- end -->"
        pattern = f"{begin}.*?{end}"
        text = re.sub(pattern, lambda _, whole=f"{begin}{table}\n{end}": whole, text, count=1, flags=re.DOTALL)
    readme.write_text(text)


if __name__ == "__main__":
    main()
