"""The commands that train, evaluate and predict: their options, read and checked by jsonargparse."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml
from docstring_parser import parse as parse_docstring

from .callbacks import Stopped
from .errors import UserError
from .recipe import Recipe, shipped_recipes


class Parser(jsonargparse.ArgumentParser):
    """Jsonargparse's, that says what is allowed in the place of an option it doesn't know."""

    def error(self, message: str, *arguments: Any, **options: Any) -> NoReturn:
        """End with status 2 and the message."""
        sys.stderr.write(f"{self.prog}: error: {message.strip()}\n")
        raise SystemExit(2)


def train(program: str, arguments: list[str]) -> int:
    """``sasa train``: a recipe, and where its run goes."""
    from .fit import train as run

    parser = Parser(prog=program, description="Train a network on images and write its weights, log and result.")
    names = ", ".join(shipped_recipes())
    parser.add_argument(
        "--config", action="config", help=f"recipe: one of the package's ({names}) or a YAML file; options override it"
    )
    _add(parser, run, skip={"recipe"})
    _add(parser, Recipe)
    options = _parsed(parser, program, arguments)
    out, resume, overwrite = (options.pop(name) for name in ("out", "resume", "overwrite"))

    def run_and_tell() -> None:
        result = run(Recipe(**options), out, resume=resume, overwrite=overwrite)
        if _first():
            print(f"{result.model}: top-1 {result.top1:.1%} on {result.val_images} validation images")

    return _status(program, run_and_tell)


def evaluate(program: str, arguments: list[str]) -> int:
    """``sasa eval``: a trained network's accuracy."""
    from .evaluate import evaluate as run

    return run_function(program, run, arguments)


def predict(program: str, arguments: list[str]) -> int:
    """``sasa predict``: a folder of images to a table."""
    from .predict import predict as run

    return run_function(program, run, arguments, positional=("images",))


def demo(program: str, arguments: list[str]) -> int:
    """``sasa demo``: attention beside convolution."""
    from .demo import demo as run

    return run_function(program, run, arguments)


def run_function(program: str, function: Callable, arguments: list[str], positional: tuple[str, ...] = ()) -> int:
    """Run a function with arguments from the command line, as its signature and docstring describe them."""
    parser = Parser(prog=program, description=parse_docstring(function.__doc__ or "").short_description)
    _add(parser, function, positional=positional)
    return _status(program, lambda: function(**_parsed(parser, program, arguments)))


def _status(program: str, run: Callable[[], Any]) -> int:
    """Exit status of ``run``: 0, or that of what it raises, which is told without a traceback."""
    try:
        run()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        if _first():
            print(f"{program}: {stopped}", file=sys.stderr)
        return int(stopped.code)  # type: ignore[arg-type]
    except SystemExit as left:  # Lightning's way to end after Ctrl-C
        if not isinstance(left.__context__, KeyboardInterrupt):
            raise
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    return 0


def _first() -> bool:
    """Whether this is the one of several processes that talks to the user."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    return not getattr(rank_zero_only, "rank", 0)


def _add(parser: Parser, function: Callable, skip: Iterable[str] = (), positional: Iterable[str] = ()) -> None:
    """The arguments of a function or dataclass, with the help of its docstring; switches are --name and --no-name."""
    helps = {p.arg_name: p.description for p in parse_docstring(function.__doc__ or "").params}
    hints = inspect.get_annotations(function, eval_str=True) if inspect.isclass(function) else None
    hints = hints or inspect.get_annotations(function, eval_str=True)
    fields = {f.name: f for f in dataclasses.fields(function)} if dataclasses.is_dataclass(function) else {}
    signature = inspect.signature(function)  # type: ignore[arg-type]
    for name, parameter in signature.parameters.items():
        if name in skip:
            continue
        field = fields.get(name)
        default = parameter.default
        if field is not None and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if name in positional:
            parser.add_argument(name, type=hints[name], help=helps.get(name))
        elif default is inspect.Parameter.empty:
            parser.add_argument(f"--{name}", type=hints[name], required=True, help=helps.get(name))
        elif isinstance(default, bool):
            parser.add_argument(f"--{name}", action=jsonargparse.ActionYesNo, default=default, help=helps.get(name))
        else:
            parser.add_argument(f"--{name}", type=hints[name], default=default, help=helps.get(name))


def _parsed(parser: Parser, program: str, arguments: list[str]) -> dict[str, Any]:
    """The options. A wrong one ends the program with status 2, its name and what is allowed."""
    arguments = [_underscored(word) for word in arguments]
    allowed = sorted({action.dest.partition(".")[0] for action in parser._actions} - {"help", "config", "print_config"})
    for place, word in enumerate(arguments):
        if word == "--config" or word.startswith("--config="):
            found = word.partition("=")[2] or (arguments[place + 1] if place + 1 < len(arguments) else "")
            path = _recipe_file(parser, found)
            arguments[place : place + (1 if "=" in word else 2)] = ["--config", str(path)]
            _check_keys(parser, path, allowed)
            break
    for word in arguments:
        name = word[2:].partition("=")[0].partition(".")[0] if word.startswith("--") else ""
        name = name.removesuffix("+")
        known = {*allowed, "help", "config", "print_config"}
        if name and name not in known and name.removeprefix("no_") not in known:
            parser.error(f"{name}: no such option{_near(name, allowed)}; expected one of {', '.join(allowed)}")
    options = vars(parser.parse_args(arguments))
    options.pop("config", None)
    return {name: vars(o) if isinstance(o, jsonargparse.Namespace) else o for name, o in options.items()}


def _recipe_file(parser: Parser, name: str) -> Path:
    """The recipe of the package that has that name, or the file."""
    shipped = shipped_recipes()
    path = shipped.get(name, Path(name))
    if not path.is_file():
        parser.error(f"config: expected a YAML file or one of {', '.join(shipped)}, got {name!r}")
    return path


def _check_keys(parser: Parser, path: Path, allowed: list[str]) -> None:
    try:
        keys = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"config: {path} is not YAML: {error}")
    if not isinstance(keys, dict):
        parser.error(f"config: expected options with values in {path}, got {type(keys).__name__}")
    for key in keys:
        if key not in allowed:
            parser.error(f"config: {path} has {key!r}{_near(str(key), allowed)}; expected one of {', '.join(allowed)}")


def _near(name: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(name, allowed, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _underscored(word: str) -> str:
    """Options may be spelled with dashes: --batch-size as well as --batch_size."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else word
