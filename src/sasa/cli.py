"""The command ``sasa``: its overview, and the commands that need only PyTorch."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
import warnings
from collections.abc import Callable, Sequence

import torch

from . import __version__
from ._extras import require
from .ops import cpu
from .ops.implementations import IMPLEMENTATIONS, Implementation

USAGE = """usage: sasa COMMAND [options]

Stand-alone self-attention for vision.

commands:
  info    versions, implementations of the operator and what they support, threads
  tables  the paper's tables of FLOPs and parameters, counted on this package's networks
  train   train a network on images (the packaged ones, or --data DIR), on one machine or many
  eval    measure a trained network's accuracy
  predict classify a folder of images into a table, or find boxes in them
  export  write a trained network as ONNX, an exported program or a compiled package
  study   train a grid of networks, options and seeds, and gather the results
  explore point at a pixel, and see what the network sees: a page, saved or served to this machine
  demo    train attention and its convolutional twin side by side, and draw what attention sees

sasa COMMAND --help lists the options."""

PACKAGES = ("triton", "torchvision", "timm", "lightning", "torchmetrics", "torchinfo", "safetensors", "matplotlib")
PACKAGES += ("datasets", "scipy", "onnx", "onnxscript", "onnxruntime", "starlette", "uvicorn", "pycocotools")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 for a user error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"sasa: error: expected one of {', '.join(COMMANDS)}, got {command!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[command](f"sasa {command}", rest)
    except KeyboardInterrupt:
        print(f"sasa {command}: interrupted", file=sys.stderr)
        return 130


def _info(program: str, arguments: list[str]) -> int:
    if arguments:
        return _no_options(program, arguments)
    rows = {"sasa": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            rows[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            rows[package] = "not installed"
    rows["threads"] = str(torch.get_num_threads())
    rows["cpu capability"] = torch.backends.cpu.get_cpu_capability()
    rows["compiled kernels"] = _compiled_kernels()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows["cuda devices"] = ", ".join(devices) or "none"
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    print("\nimplementations of the operator, fastest first:")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table already reports missing compiled kernels
        found = _implementations()
    for implementation, missing in sorted(found.items(), key=lambda item: item[1] is not None):
        print(f"  {implementation.name:<10} {implementation.summary}{f' (not here: {missing})' if missing else ''}")
    return 0


def _implementations() -> dict[Implementation, str | None]:
    """Each with the reason why it isn't available on this machine, or None."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    images = [torch.empty(1, 1, 1, 1, 1, device=device) for device in ("cpu", accelerator) if device is not None]
    found: dict[Implementation, str | None] = {}
    for one in IMPLEMENTATIONS:
        reasons = [
            one.unsupported(image, 1) or (None if one.automatic(image) else "no device for it") for image in images
        ]
        found[one] = None if None in reasons else reasons[-1]
    return found


def _no_options(program: str, arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]):
        name = program.removeprefix("sasa ")
        line = next(line for line in USAGE.splitlines() if line.startswith(f"  {name} "))
        summary = line.strip().removeprefix(name).strip()
        print(f"usage: {program}\n\n{summary[0].upper()}{summary[1:]}.")
        return 0
    print(f"usage: {program}\n{program}: error: takes no options, got {' '.join(arguments)}", file=sys.stderr)
    return 2


def _tables(program: str, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        program, description="The paper's tables of FLOPs and parameters, counted on this package's networks."
    )
    parser.add_argument("--detection", action="store_true", help="table 2, of detectors, instead of those of networks")
    try:
        detection = parser.parse_args(arguments).detection
    except SystemExit as done:
        return int(done.code or 0)
    try:
        if detection:
            print(require("sasa.models.detection_tables", "detection").text())
        else:
            tables = require("sasa.models.tables", "models")
            print(tables.as_text(tables.paper_tables()))
    except ImportError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _compiled_kernels() -> str:
    """The instruction set that the CPU kernels use and those they could use, or why there are none."""
    reason = cpu.why_missing()
    if reason is not None:
        return f"no: {reason}"
    try:
        return f"{cpu.capability()} (of {', '.join(cpu.capabilities())})"
    except ValueError as error:
        return f"error: {error}"


def _call(module: str, name: str) -> Callable[[str, list[str]], int]:
    """A command from another module, which needs more than PyTorch."""

    def command(program: str, arguments: list[str]) -> int:
        try:
            require("sasa.train", "train")
            run = getattr(require(module, "train"), name)
        except ImportError as error:
            print(f"{program}: error: {error}", file=sys.stderr)
            return 2
        return run(program, arguments)

    return command


COMMANDS: dict[str, Callable[[str, list[str]], int]] = {
    "info": _info,
    "tables": _tables,
    "train": _call("sasa.train.command", "train"),
    "eval": _call("sasa.train.command", "evaluate"),
    "predict": _call("sasa.train.command", "predict"),
    "export": _call("sasa.export.command", "export"),
    "study": _call("sasa.study.command", "study"),
    "explore": _call("sasa.explore.command", "command"),
    "demo": _call("sasa.train.command", "demo"),
}

if __name__ == "__main__":
    sys.exit(main())
