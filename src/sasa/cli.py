"""The command ``sasa``: what it can do, and what needs PyTorch alone."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Sequence

import torch

from . import __version__
from ._extras import require
from .ops import cpu
from .ops.implementations import IMPLEMENTATIONS

USAGE = """usage: sasa COMMAND [options]

Stand-alone self-attention for vision.

commands:
  info    versions, implementations of the operator and what they support, threads
  tables  the paper's tables of FLOPs and parameters, counted on this package's networks
  train   train a network on images (the packaged ones, or --data DIR), on one machine or many
  eval    measure a trained network's accuracy
  predict classify a folder of images into a table
  study   train a grid of networks, options and seeds, and gather what came out
  demo    train attention and its convolutional twin side by side, and draw what attention sees

sasa COMMAND --help tells the options."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 for a mistake of the user's."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    command, *rest = arguments
    commands = {
        "info": _info,
        "tables": _tables,
        "train": _train,
        "eval": _eval,
        "predict": _predict,
        "study": _study,
        "demo": _demo,
    }
    if command not in commands:
        print(f"sasa: error: expected one of {', '.join(commands)}, got {command!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        return commands[command](rest)
    except KeyboardInterrupt:
        print(f"sasa {command}: interrupted", file=sys.stderr)
        return 130


def _info(arguments: list[str]) -> int:
    if arguments:
        print(f"usage: sasa info\nsasa info: error: takes no options, got {' '.join(arguments)}", file=sys.stderr)
        return 2
    rows = {"sasa": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in (
        "triton",
        "torchvision",
        "timm",
        "lightning",
        "torchmetrics",
        "torchinfo",
        "safetensors",
        "matplotlib",
        "webdataset",
        "datasets",
    ):
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
    for implementation in IMPLEMENTATIONS:
        print(f"  {implementation.name:<10} {implementation.summary}")
    return 0


def _tables(arguments: list[str]) -> int:
    if arguments:
        print(f"usage: sasa tables\nsasa tables: error: takes no options, got {' '.join(arguments)}", file=sys.stderr)
        return 2
    try:
        tables = require("sasa.models.tables", "models")
    except ImportError as error:
        print(f"sasa tables: error: {error}", file=sys.stderr)
        return 2
    print(tables.as_text(tables.paper_tables()))
    return 0


def _compiled_kernels() -> str:
    """The instruction set that the CPU kernels use and those they could, or why there are none."""
    reason = cpu.why_missing()
    if reason is not None:
        return f"no: {reason}"
    try:
        return f"{cpu.capability()} (of {', '.join(cpu.capabilities())})"
    except ValueError as error:
        return f"error: {error}"


def _train(arguments: list[str]) -> int:
    return _call("sasa train", "sasa.train.command", "train", arguments)


def _eval(arguments: list[str]) -> int:
    return _call("sasa eval", "sasa.train.command", "evaluate", arguments)


def _predict(arguments: list[str]) -> int:
    return _call("sasa predict", "sasa.train.command", "predict", arguments)


def _study(arguments: list[str]) -> int:
    return _call("sasa study", "sasa.study.command", "study", arguments)


def _demo(arguments: list[str]) -> int:
    return _call("sasa demo", "sasa.train.command", "demo", arguments)


def _call(program: str, module: str, name: str, arguments: list[str]) -> int:
    """Run a command of another module, which needs more than PyTorch alone."""
    try:
        require("sasa.train", "train")
        command = getattr(require(module, "train"), name)
    except ImportError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    return command(program, arguments)


if __name__ == "__main__":
    sys.exit(main())
