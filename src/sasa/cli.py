"""The command ``sasa``: info, tables, train, demo."""

from __future__ import annotations

import importlib.metadata
import inspect
import platform
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

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
  train   train a network on images (the packaged ones, or --data DIR)
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
    commands = {"info": _info, "tables": _tables, "train": _train, "demo": _demo}
    if command not in commands:
        print(f"sasa: error: expected one of {', '.join(commands)}, got {command!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    return commands[command](rest)


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
    return _call("sasa train", arguments, lambda: require("sasa.train.fit", "train").train, report=True)


def _demo(arguments: list[str]) -> int:
    return _call("sasa demo", arguments, lambda: require("sasa.train.demo", "train").demo, report=False)


def _call(program: str, arguments: list[str], find: Callable[[], Callable], report: bool) -> int:
    """Run a function with its arguments read from the command line, as its signature and docstring describe them."""
    try:
        jsonargparse = require("jsonargparse", "train")
        require("sasa.train", "train")
        function = find()
    except ImportError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    from .train import UserError

    options = vars(_parser(jsonargparse, program, function).parse_args([_underscored(word) for word in arguments]))
    options.pop("config")
    try:
        result = function(**options)
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    if report:
        print(f"{result.model}: top-1 {result.top1:.1%} on {result.val_images} validation images")
    return 0


def _parser(jsonargparse: ModuleType, program: str, function: Callable) -> Any:
    """A parser of the function's arguments; switches are --name and --no_name."""
    docstring = require("docstring_parser", "train").parse(function.__doc__ or "")
    helps = {parameter.arg_name: parameter.description for parameter in docstring.params}
    switches = [p for p in inspect.signature(function).parameters.values() if isinstance(p.default, bool)]
    parser = jsonargparse.ArgumentParser(prog=program, description=docstring.short_description)
    parser.add_argument("--config", action="config", help="YAML file of options; the command line overrides it")
    parser.add_function_arguments(function, as_group=False, skip={switch.name for switch in switches})
    for switch in switches:
        parser.add_argument(
            f"--{switch.name}", action=jsonargparse.ActionYesNo, default=switch.default, help=helps[switch.name]
        )
    return parser


def _underscored(word: str) -> str:
    """Options may be spelled with dashes: --batch-size as well as --batch_size."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else word


if __name__ == "__main__":
    sys.exit(main())
