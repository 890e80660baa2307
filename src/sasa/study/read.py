"""A study's plan, read and validated as a whole before anything is trained."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

from .._yaml import read_mapping
from ..train.errors import OptionError, near
from ..train.recipe import Recipe, check_option, shipped_recipes
from .plan import Search, StudyError, StudyPlan, combinations, merged, run_key

KEYS = ("title", "recipe", "options", "tune", "grid", "seeds", "metric", "plot")

MOST = 10_000
"""Maximum number of training runs in a study."""

UNKNOWN: Any = SimpleNamespace(classes=["?"] * 10, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
"""Placeholder for images that have not been read yet."""


def shipped_plans() -> dict[str, Path]:
    """The package's studies by name."""
    folder = Path(str(resources.files("sasa.study") / "plans"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_plan(name: Path) -> Path:
    """The packaged study of that name, or the file."""
    shipped = shipped_plans()
    path = shipped.get(str(name), name)
    if not path.is_file():
        raise StudyError(f"plan: expected a YAML file or one of {', '.join(shipped)}, got {str(name)!r}")
    return path


def read_plan(path: Path) -> StudyPlan:
    """Read a study's file, or the ``plan.json`` of its folder.

    Raises:
        StudyError: there is an error in it.
    """
    found = _load(path)
    _known(f"{path}: ", found, KEYS)
    for key in ("grid", "seeds"):
        if key not in found:
            raise StudyError(f"{path}: {key}: expected, but missing")
    given = found.get("recipe", {})
    if isinstance(given, str):
        file = shipped_recipes().get(given, path.parent / given)
        if not file.is_file():
            shipped = ", ".join(shipped_recipes())
            raise StudyError(f"{path}: recipe: expected options, a YAML file or one of {shipped}, got {given!r}")
        own, where = _load(file), f"{file}: "
    else:
        own, where = _mapping(f"{path}: recipe", given), f"{path}: recipe."
    own.pop("seed", None)
    if path.suffix == ".json":  # possibly from an earlier version, with other options
        own = {key: value for key, value in own.items() if key in get_type_hints(Recipe)}
    recipe = merged(Recipe().as_dict(), _options(where, own))
    options = _options(f"{path}: options.", _mapping(f"{path}: options", found.get("options")))
    recipe = merged(recipe, options)
    if recipe["data"] is not None:
        recipe["data"] = str(Path(recipe["data"]).absolute())
    recipe.pop("seed")
    grid = _grid(f"{path}: grid", found["grid"])
    for key in grid:
        if key in options:
            raise StudyError(f"{path}: options.{key}: expected in options or in grid, got it in both")
    tune = None if found.get("tune") is None else _search(f"{path}: tune", found["tune"], grid)
    seeds = _seeds(f"{path}: seeds", found["seeds"])
    for name, values, each in (("grid", grid, seeds), *([("tune", tune.grid, tune.seeds)] if tune else [])):
        count = math.prod(map(len, values.values())) * len(each)
        if count > MOST:
            raise StudyError(f"{path}: {name}: expected at most {MOST:,} trainings, got {count:,}")
    from ..train.task import task_of

    result = task_of(recipe["model"]).result
    numbers = [name for name, hint in get_type_hints(result).items() if hint in (int, float)]
    metric = _one_of(f"{path}: metric", found.get("metric", "top1"), numbers)
    plot = {"x": "flops", "line": "model" if "model" in grid else next(iter(grid))}
    plot |= _mapping(f"{path}: plot", found.get("plot"))
    _known(f"{path}: plot.", plot, ("x", "line"))
    _one_of(f"{path}: plot.line", plot["line"], grid)
    _one_of(f"{path}: plot.x", plot["x"], [*(key for key in grid if key != plot["line"]), *numbers])
    title = found.get("title", path.stem)
    if not isinstance(title, str):
        raise StudyError(f"{path}: title: expected text, got {title!r}")
    return StudyPlan(title, recipe, tune, grid, seeds, metric, plot)


def check_trainings(plan: StudyPlan, path: Path) -> None:
    """Check that every training run of a study can start.

    Raises:
        StudyError: one can't; the message names the file, the run and what is wrong with it.
    """
    import torch

    from ..train.task import Classification, task_of

    sought = combinations(plan.tune.grid) if plan.tune else [{}]
    each = [(plan.tune.fixed, one) for one in sought] if plan.tune else []
    each += [(one, options) for one in sought for options in combinations(plan.grid)]
    networks: set[str] = set()
    for first, then in each:
        values = merged(merged(plan.recipe, first), then)
        values["data"] = None if values["data"] is None else Path(values["data"])
        recipe = Recipe(**values)
        where = f"{path}: with {', '.join(f'{key} {value}' for key, value in (first | then).items())}"
        try:
            recipe.check()
        except ValueError as error:
            raise StudyError(f"{where}: {error}") from error
        if recipe.devices not in ("auto", 1, "1") or recipe.num_nodes != 1:
            raise StudyError(f"{where}: devices: expected 1, and num_nodes 1: each training of a study has one device")
        if recipe.data is not None and not recipe.data.is_dir():
            raise StudyError(f"{where}: data: expected a folder, got {recipe.data}")
        network = json.dumps([recipe.model, recipe.model_options])
        if network not in networks:
            networks.add(network)
            try:
                with torch.device("meta"):  # shapes without values
                    task_of(recipe.model).build(Classification().facts(recipe, UNKNOWN))
            except Exception as error:  # a network may raise anything for an invalid option
                raise StudyError(f"{where}: model_options: {error}") from error


def _load(path: Path) -> dict[str, Any]:
    try:
        return _mapping(f"{path}", json.loads(path.read_bytes()) if path.suffix == ".json" else read_mapping(path))
    except StudyError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        where = "" if str(error).startswith(f"{path}: ") else f"{path}: can't be read: "
        raise StudyError(f"{where}{error}") from error


def _mapping(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        raise StudyError(f"{where}: expected keys with values, got {value!r}")
    return dict(value or {})


def _known(where: str, found: Mapping[str, Any], allowed: Collection[str]) -> None:
    for key in found:
        if key not in allowed:
            raise StudyError(f"{where}{key}: no such key{near(key, allowed)}; expected one of {', '.join(allowed)}")


def _one_of(where: str, value: Any, allowed: Collection[str]) -> str:
    if value not in list(allowed):
        raise StudyError(f"{where}: expected one of {', '.join(allowed)}, got {value!r}{near(str(value), allowed)}")
    return value


def _options(where: str, found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _value(f"{where}{key}", key, value) for key, value in found.items()}


def _value(where: str, key: str, value: Any) -> Any:
    """A value of a recipe's option, validated as in a recipe."""
    name, dot, inner = key.partition(".")
    hints = get_type_hints(Recipe)
    if name == "seed":
        raise StudyError(f"{where}: expected under seeds, which all combinations are trained with")
    if name not in hints:
        allowed = [option for option in hints if option != "seed"]
        raise StudyError(f"{where}: no such option{near(name, allowed)}; expected one of {', '.join(allowed)}")
    if name == "data" and isinstance(value, str):
        check_option(name, Path(value))
        return value
    try:
        check_option(name, {inner: value} if dot else value)
    except OptionError as error:
        raise StudyError(f"{where}: {str(error).removeprefix(f'{name}: ')}") from error
    return float(value) if hints[name] is float else value


def _grid(where: str, found: Any) -> dict[str, list[Any]]:
    grid = _mapping(where, found)
    if not grid:
        raise StudyError(f"{where}: expected options with lists of values, got none")
    for key, values in grid.items():
        place = f"{where}.{key}"
        if not isinstance(values, list) or not values:
            raise StudyError(f"{place}: expected a list of values, got {values!r}")
        grid[key] = values = [_value(place, key, value) for value in values]
        names: set[str] = set()
        for value in values:
            name = run_key({key: value}, 0)
            if name in names:
                raise StudyError(f"{place}: expected different values, got {value!r} twice")
            names.add(name)
    return grid


def _seeds(where: str, found: Any) -> list[int]:
    whole = isinstance(found, list) and all(type(seed) is int and 0 <= seed < 2**32 for seed in found)
    if not whole or not found:
        raise StudyError(f"{where}: expected a list of whole numbers from 0 to 2^32 - 1, got {found!r}")
    if len(set(found)) != len(found):
        raise StudyError(f"{where}: expected different seeds, got {found!r}")
    return found


def _search(where: str, value: Any, grid: Mapping[str, Any]) -> Search:
    found = _mapping(where, value)
    _known(f"{where}.", found, ("fixed", "grid", "seeds"))
    for key in ("grid", "seeds"):
        if key not in found:
            raise StudyError(f"{where}.{key}: expected, but missing")
    fixed = _options(f"{where}.fixed.", _mapping(f"{where}.fixed", found.get("fixed")))
    sought = _grid(f"{where}.grid", found["grid"])
    for key in sought:
        for name, other in (("grid", grid), ("tune.fixed", fixed)):
            if key in other:
                raise StudyError(f"{where}.grid.{key}: expected in one place, got it in {name} too")
    return Search(fixed, sought, _seeds(f"{where}.seeds", found["seeds"]))
