"""A study's file, read and checked as a whole: what can't be meant is told before anything is trained."""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
import json
import math
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import jsonargparse
import torch
import yaml

from ..models import create_model
from ..train import OptionError, Recipe
from ..train.recipe import shipped_recipes
from .plan import NUMBERS, Plan, StudyError, Tune, as_recipe, combinations, put, run_key, shipped_plans

KEYS = ("title", "recipe", "options", "tune", "grid", "seeds", "metric", "plot")

_HINTS = inspect.get_annotations(Recipe, eval_str=True)
_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "options with values",
    Path: "a folder",
    type(None): "null",
}


def find_plan(name: Path) -> Path:
    """The study of the package that has that name, or the file."""
    shipped = shipped_plans()
    path = shipped.get(str(name), name)
    if not path.is_file():
        raise StudyError(f"plan: expected a YAML file or one of {', '.join(shipped)}, got {str(name)!r}")
    return path


def read_plan(path: Path) -> Plan:
    """Read a study's file.

    Raises:
        StudyError: something in it can't be meant.
    """
    found = _load(path)
    _known(path, "", found, KEYS)
    for key in ("grid", "seeds"):
        if key not in found:
            raise StudyError(f"{path}: {key}: expected, but missing")
    recipe = Recipe().as_dict()
    if found.get("recipe") is not None:
        recipe = put(recipe, _recipe(path, found["recipe"]))
    options = _options(path, "options", _mapping(path, "options", found.get("options")))
    recipe = put(recipe, options)
    if recipe["data"] is not None:
        recipe["data"] = str(Path(recipe["data"]).absolute())
    recipe.pop("seed")
    grid = _grid(path, "grid", found["grid"])
    for key in grid:
        if key in options:
            raise StudyError(f"{path}: options.{key}: expected in options or in grid, got it in both")
    tune = None if found.get("tune") is None else _tune(path, found["tune"], grid)
    metric = _one_of(path, "metric", found.get("metric", "top1"), NUMBERS)
    line = "model" if "model" in grid else next(iter(grid))
    plot = {"x": "flops", "line": line} | _mapping(path, "plot", found.get("plot"))
    _known(path, "plot.", plot, ("x", "line"))
    line = _one_of(path, "plot.line", plot["line"], grid)
    x = _one_of(path, "plot.x", plot["x"], [*(key for key in grid if key != line), *NUMBERS])
    title = found.get("title", path.stem)
    if not isinstance(title, str):
        raise StudyError(f"{path}: title: expected text, got {title!r}")
    return Plan(title, recipe, tune, grid, _seeds(path, "seeds", found["seeds"]), metric, x, line)


def check_trainings(plan: Plan, path: Path) -> None:
    """Make sure that every training of a study can be begun.

    Raises:
        StudyError: one can't; the message names the file, the training and what is wrong with it.
    """
    common = [plan.tune.fixed | options for options in combinations(plan.tune.grid)] if plan.tune else []
    merged = [({**one}, put(plan.recipe, one)) for one in common]
    for tuned, cell in itertools.product(combinations(plan.tune.grid if plan.tune else {}), combinations(plan.grid)):
        merged.append((tuned | cell, put(put(plan.recipe, tuned), cell)))
    networks: set[str] = set()
    for options, values in merged:
        recipe = as_recipe(values)
        try:
            recipe.check()
            if recipe.devices not in ("auto", 1, "1") or recipe.num_nodes != 1:
                raise OptionError("devices: expected 1, and num_nodes 1: each training of a study has one device")
            if recipe.data is not None and not recipe.data.is_dir():
                raise OptionError(f"data: expected a folder, got {recipe.data}")
            network = json.dumps([recipe.model, recipe.model_options])
            if network not in networks:
                networks.add(network)
                with torch.device("meta"):  # shapes without values
                    create_model(recipe.model, **recipe.model_options)
        except (OptionError, ValueError, TypeError) as error:
            reason = str(error) if isinstance(error, OptionError) else f"model_options: {error}"
            where = ", ".join(f"{key} {value}" for key, value in options.items())
            raise StudyError(f"{path}: with {where}: {reason}") from error


def _load(path: Path) -> dict[str, Any]:
    try:
        load = json.loads if path.suffix == ".json" else yaml.safe_load
        found = load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise StudyError(f"{path}: expected YAML: {error}") from error
    return _mapping(path, "the file", found)


def _mapping(path: Path, where: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise StudyError(f"{path}: {where}: expected keys with values, got {value!r}")
    return {str(key): inner for key, inner in value.items()}


def _known(path: Path, where: str, found: Mapping[str, Any], allowed: Collection[str]) -> None:
    for key in found:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise StudyError(f"{path}: {where}{key}: no such key{hint}; expected one of {', '.join(allowed)}")


def _one_of(path: Path, where: str, value: Any, allowed: Collection[str]) -> str:
    if value not in tuple(allowed):
        near = difflib.get_close_matches(str(value), allowed, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise StudyError(f"{path}: {where}: expected one of {', '.join(allowed)}, got {value!r}{hint}")
    return value


def _recipe(path: Path, value: Any) -> dict[str, Any]:
    """A recipe of the package, of a file beside the study's, or written out."""
    if not isinstance(value, str):
        found = _mapping(path, "recipe", value)
        found.pop("seed", None)
        return _options(path, "recipe", found)
    shipped = shipped_recipes()
    file = shipped.get(value, path.parent / value)
    if not file.is_file():
        raise StudyError(f"{path}: recipe: expected options, a YAML file or one of {', '.join(shipped)}, got {value!r}")
    found = _load(file)
    found.pop("seed", None)
    return _options(file, "", found)


def _options(path: Path, where: str, found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _value(path, f"{where}.{key}" if where else key, key, value) for key, value in found.items()}


def _value(path: Path, where: str, key: str, value: Any) -> Any:
    """A value of a recipe's option, checked and converted as those of ``sasa train`` are."""
    name, dot, inner = key.partition(".")
    if name == "seed":
        raise StudyError(f"{path}: {where}: expected under seeds, which all combinations are trained with")
    allowed = [option for option in _HINTS if option != "seed"]
    if name not in allowed:
        near = difflib.get_close_matches(name, allowed, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise StudyError(f"{path}: {where}: no such option{hint}; expected one of {', '.join(allowed)}")
    hint = _HINTS[name]
    expected = _expected(hint)
    if dot and (get_origin(hint) is not dict or not inner):
        raise StudyError(f"{path}: {where}: expected {expected} as {name}, got a key inside it")
    wrong = StudyError(f"{path}: {where}: expected {'a value' if inner else expected}, got {value!r}")
    if value is None and not inner:
        if type(None) in get_args(hint):
            return None
        raise wrong
    try:
        converted = _parser(name).parse_object({name: {inner: value} if inner else value})[name]
    except jsonargparse.ArgumentError:
        raise wrong from None
    converted = converted[inner] if inner else converted
    if isinstance(converted, float) and not math.isfinite(converted):
        raise wrong
    return str(converted) if isinstance(converted, Path) else converted


@functools.cache
def _parser(name: str) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{name}", type=_HINTS[name])
    return parser


def _expected(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_expected, get_args(hint)))
    return _NAMES[get_origin(hint) or hint]


def _grid(path: Path, where: str, found: Any) -> dict[str, list[Any]]:
    grid = _mapping(path, where, found)
    if not grid:
        raise StudyError(f"{path}: {where}: expected options with lists of values, got none")
    for key, values in grid.items():
        place = f"{where}.{key}"
        if not isinstance(values, list) or not values:
            raise StudyError(f"{path}: {place}: expected a list of values, got {values!r}")
        grid[key] = values = [_value(path, place, key, value) for value in values]
        names = [run_key({key: value}, 0) for value in values]
        for index, value in enumerate(values):
            if value in values[:index] or names[index] in names[:index]:
                raise StudyError(f"{path}: {place}: expected different values, got {value!r} twice")
    return grid


def _seeds(path: Path, where: str, found: Any) -> list[int]:
    whole = isinstance(found, list) and all(type(seed) is int and seed >= 0 for seed in found)
    if not whole or not found:
        raise StudyError(f"{path}: {where}: expected a list of whole numbers from 0, got {found!r}")
    if len(set(found)) != len(found):
        raise StudyError(f"{path}: {where}: expected different seeds, got {found!r}")
    return found


def _tune(path: Path, value: Any, grid: Mapping[str, Any]) -> Tune:
    found = _mapping(path, "tune", value)
    _known(path, "tune.", found, ("fixed", "grid", "seeds"))
    for key in ("grid", "seeds"):
        if key not in found:
            raise StudyError(f"{path}: tune.{key}: expected, but missing")
    fixed = _options(path, "tune.fixed", _mapping(path, "tune.fixed", found.get("fixed")))
    sought = _grid(path, "tune.grid", found["grid"])
    for key in sought:
        for name, other in (("grid", grid), ("tune.fixed", fixed)):
            if key in other:
                raise StudyError(f"{path}: tune.grid.{key}: expected in one place, got it in {name} too")
    return Tune(fixed, sought, _seeds(path, "tune.seeds", found["seeds"]))
