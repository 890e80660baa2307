"""The commands that train, evaluate and predict; jsonargparse parses and validates their options.

Lightning, timm and torchvision take seconds to import, so they are imported only after the options are parsed.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml
from docstring_parser import parse as parse_docstring

from .._yaml import read_mapping
from .errors import Stopped, UserError, near
from .recipe import Recipe, Resume, shipped_recipes

TYPICAL = """usage: sasa train [options]

  sasa train --config demo --out runs/first          the packaged images, two minutes on two cores
  sasa train --config demo --data DIR --out runs/x   your own: one folder a class, or train and val folders of them
  sasa train --config demo --out runs/x --resume auto   resume it after whatever stopped it

sasa train --help lists the options."""


class Parser(jsonargparse.ArgumentParser):
    """Jsonargparse's parser, without abbreviations, and with one-line errors."""

    def __init__(self, program: str, description: str | None) -> None:
        super().__init__(prog=program, description=description, allow_abbrev=False)

    def error(self, message: str, *arguments: Any, **options: Any) -> NoReturn:
        """Exit with status 2 and the message."""
        sys.stderr.write(f"{self.prog}: error: {message.strip()}\n")
        raise SystemExit(2)


def train(program: str, arguments: list[str]) -> int:
    """``sasa train``: a recipe, and the folder for its run."""
    if not arguments:
        print(TYPICAL, file=sys.stderr)
        return 2
    parser = Parser(program, "Train a network on images and write its weights, log and result.")
    names = ", ".join(shipped_recipes())
    parser.add_argument(
        "--config", type=str, help=f"recipe: one of the package's ({names}) or a YAML file; options override it"
    )
    parser.add_argument("--print_config", type=bool, default=False, help="print the recipe and do nothing else")
    parser.add_argument("--out", type=Path, default=Path("runs/train"), help="folder to write to")
    parser.add_argument(
        "--resume", type=Resume, default="never", help="auto resumes the run in out, or starts it; never refuses one"
    )
    parser.add_argument("--overwrite", type=bool, default=False, help="replace an earlier run in out")
    parser.add_class_arguments(Recipe, as_group=False)
    own = {"config": "auto", "print_config": False, "out": "", "resume": "", "overwrite": False}
    defaults = own | {field.name: field.default for field in dataclasses.fields(Recipe)}
    arguments = _plain(parser, arguments, defaults)
    first = argparse.ArgumentParser(program, add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    config = first.parse_known_args(arguments)[0].config
    if config is not None:
        parser.set_defaults(_recipe_values(parser, config))
    options = vars(parser.parse_args(arguments))
    _, show, out, resume, overwrite = (options.pop(name) for name in own)
    recipe = Recipe(**options)

    def run() -> None:
        recipe.check()
        if show:
            sys.stdout.write(yaml.safe_dump(recipe.as_dict(), sort_keys=False))
            return
        from .fit import train

        result = train(recipe, out, resume=resume, overwrite=overwrite)
        if _first():
            print(result)

    return _status(program, run)


def evaluate(program: str, arguments: list[str]) -> int:
    """``sasa eval``: a trained network's accuracy."""
    from .evaluate import evaluate

    return run_function(program, evaluate, arguments)


def predict(program: str, arguments: list[str]) -> int:
    """``sasa predict``: a folder of images to a table."""
    from .predict import predict

    return run_function(program, predict, arguments, positional=("images",))


def demo(program: str, arguments: list[str]) -> int:
    """``sasa demo``: attention compared with convolution."""
    from .demo import demo

    return run_function(program, demo, arguments)


def run_function(program: str, function: Callable, arguments: list[str], positional: tuple[str, ...] = ()) -> int:
    """Run a function with arguments from the command line, as its signature and docstring describe them.

    A positional parameter that has a default takes any number of paths.
    """
    documented = parse_docstring(function.__doc__ or "")
    parser = Parser(program, documented.short_description)
    for name in positional:
        text = next((one.description for one in documented.params if one.arg_name == name), None)
        needed = inspect.signature(function).parameters[name].default is inspect.Parameter.empty
        several: dict[str, Any] = {} if needed else {"nargs": "*"}
        parser.add_argument(name, type=Path, help=text, **several)
    parser.add_function_arguments(function, as_group=False, skip=set(positional))
    parameters = inspect.signature(function).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.name not in positional}
    options = vars(parser.parse_args(_plain(parser, arguments, defaults)))
    return _status(program, lambda: function(**options))


def _status(program: str, run: Callable[[], Any]) -> int:
    """Exit status of ``run``: 0, or that of the exception it raises, which is reported without a traceback."""
    try:
        run()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if _first():
            print(f"{program}: {stopped}", file=sys.stderr)
        return int(stopped.code)  # type: ignore[arg-type]
    except SystemExit as left:  # raised by Lightning after Ctrl-C
        if not isinstance(left.__context__, KeyboardInterrupt):
            raise
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    return 0


def _first() -> bool:
    """Whether this is the one of several processes that prints."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    return not getattr(rank_zero_only, "rank", 0)


def _plain(parser: Parser, arguments: list[str], defaults: dict[str, Any]) -> list[str]:
    """The arguments in jsonargparse's form: with underscores, and values for switches (--strict, --no-tensorboard).

    An unknown option ends the program with status 2, its name and the allowed ones.
    """
    plain: list[str] = []
    for place, word in enumerate(arguments):
        if not word.startswith("--") or word == "--":
            plain.append(_as_path(word) if plain and plain[-1] in ("--data", "--out") else word)
            continue
        option, equals, value = word.partition("=")
        name = option[2:].replace("-", "_")
        if name.startswith("no_") and isinstance(defaults.get(name[3:]), bool) and not equals:
            plain.append(f"--{name[3:]}=false")
            continue
        key = name.partition(".")[0].removesuffix("+")
        if key not in defaults and key != "help":
            parser.error(f"{key}: no such option{near(key, defaults)}; expected one of {', '.join(sorted(defaults))}")
        following = arguments[place + 1] if place + 1 < len(arguments) else ""
        if isinstance(defaults.get(name), bool) and not equals and following not in ("true", "false"):
            equals, value = "=", "true"
        if name in ("data", "out") and equals:
            value = _as_path(value)
        plain.append(f"--{name}{equals}{value}")
    return plain


def _as_path(word: str) -> str:
    """The same file, in a form that is never parsed as YAML: ``null`` would omit the option."""
    return word if word.startswith("/") else f"./{word}"


def _recipe_values(parser: Parser, name: str) -> dict[str, Any]:
    """The values in the packaged recipe of that name, or in a file."""
    shipped = shipped_recipes()
    path = shipped.get(name, Path(name))
    if not path.is_file():
        parser.error(f"config: expected a YAML file or one of {', '.join(shipped)}, got {name!r}")
    try:
        values = read_mapping(path)
    except ValueError as error:
        parser.error(f"config: {error}")
    allowed = sorted(field.name for field in dataclasses.fields(Recipe))
    for key, value in values.items():
        if key in ("out", "resume", "overwrite"):
            parser.error(f"config: {path} has {key!r}, which only the command line may have")
        if key not in allowed:
            parser.error(f"config: {path} has {key!r}{near(key, allowed)}; expected one of {', '.join(allowed)}")
        if key == "data" and isinstance(value, str):
            values[key] = Path(value)
    parsed = vars(parser.parse_object(values))
    return {key: parsed[key] for key in values}
