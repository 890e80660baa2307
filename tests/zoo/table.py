"""docs/zoo.md, written from docs/zoo.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
FILE, PAGE = ROOT / "docs/zoo.json", ROOT / "docs/zoo.md"

Results = dict[str, dict[str, Any]]

INTRODUCTION = """# Converted networks

`make zoo` takes the smallest network of every convolutional family of timm, and networks from torchvision,
segmentation_models_pytorch and monai, all with random weights. Each network is tested in two ways:

1. `sasa.convert(network, kernel_size=3, num_heads=4)`: outputs of the same sizes, for two image sizes unless the
   network supports only one; a training step with a finite loss and finite gradients; evaluation; a state dict that a
   second conversion loads strictly and with which it computes the same bits. If nothing can be converted with these
   options, `grouped=True`, and then `stem=True`, are added; the column "with" lists them.
2. `sasa.convert(network, keep_function=True)`: outputs within 10⁻⁴ of the original network's, relative to the largest.
   Some networks with random weights amplify rounding beyond that; they are compared in float64 and marked.

A network is *refused* if nothing in it can be converted; `convert` then raises an error.
See [how to convert your own network](converting.md).
"""


def page(results: Results) -> str:
    """The whole page."""
    parts = [INTRODUCTION, _summary(results)]
    for library in dict.fromkeys(result["library"] for result in results.values()):
        header = (
            "family | network | M parameters | converted | with | left alone | sizes | runs and trains | same function"
        )
        lines = [f"| {header} |", "|---" * 9 + "|"]
        lines += [_line(result) for result in results.values() if result["library"] == library]
        parts += [f"## {library}\n", "\n".join(lines) + "\n"]
    return "\n".join(parts)


def _summary(results: Results) -> str:
    every = list(results.values())
    counts = {
        "networks": len(every),
        "converted, run and trained": sum("sizes" in r for r in every),
        "refused": sum("refused" in r for r in every),
        "failed in this": sum("fault" in r for r in every),
        "converted with their function kept": sum("difference" in r for r in every),
        "refused in that": sum("kept_refused" in r for r in every),
        "failed in that": sum("kept_fault" in r for r in every),
        "failed before conversion": sum("original_fails" in r for r in every),
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items()) + ".\n"


def _line(result: dict[str, Any]) -> str:
    def either(*names: str) -> Iterator[str]:
        yield from (
            f"{name.replace('kept_', '').replace('_', ' ')}: {result[name]}" for name in names if name in result
        )

    parameters = sizes = converted = ""
    if "parameters" in result:
        parameters = f"{result['parameters'] / 1e6:.2f} → {result['parameters_after'] / 1e6:.2f}"
        sizes = ", ".join("x".join(map(str, size)) for size in result["sizes"])
        converted = str(result["converted"])
    same = next(either("kept_fault", "kept_refused"), "")
    if "difference" in result:
        dtype, difference = list(result["difference"].items())[-1]
        same = f"{result['kept']}: {difference:.0e}" + (" (float64)" if dtype == "float64" else "")
        if result["not_kept"]:
            same += f"; {_counted(result['not_kept'])}"
    runs = next(either("fault", "refused", "original_fails"), "yes")
    cells = [result["family"], result["network"], parameters, converted, ", ".join(result.get("options", ()))]
    cells += [_counted(result.get("left_alone", {})), sizes, runs, same]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _counted(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} {why}" for why, count in reasons.items())
