"""What a study is to do: a grid of networks, options and seeds, laid out in trainings."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from ..train import Recipe, Result, UserError
from ..train.recipe import FREE_TO_CHANGE

MAY_DIFFER = FREE_TO_CHANGE - {"data", "strict"}
"""Between trainings of one study: a run's own images may move, but no two runs are compared on different ones."""

NUMBERS = tuple(name for name, hint in get_type_hints(Result).items() if hint in (int, float))
"""What ``result.json`` has that can be compared."""

LOWER_IS_BETTER = frozenset(("val_loss", "seconds_per_epoch"))
PERCENT = frozenset(("top1", "top5"))

KEY_LENGTH = 160
"""Longest name of a run: its files' names are longer, and file systems take 255 bytes."""


class StudyError(UserError, ValueError):
    """A study that can't be meant: the message names the file, the key, what was expected and what came."""


@dataclass(frozen=True)
class Cell:
    """One training of a study.

    Attributes:
        key: its name, which is that of its files.
        options: what distinguishes it, but for the seed; dotted keys go into mappings.
        seed: of the training.
        recipe: all that the training is told.
    """

    key: str
    options: dict[str, Any]
    seed: int
    recipe: Recipe


@dataclass(frozen=True)
class Tune:
    """A search before the grid, whose best options all trainings of the grid then have.

    Attributes:
        fixed: options of these trainings alone.
        grid: the options that are sought, with the values to try.
        seeds: of each combination.
    """

    fixed: dict[str, Any]
    grid: dict[str, list[Any]]
    seeds: list[int]


@dataclass(frozen=True)
class Plan:
    """A study.

    Attributes:
        title: over the plot and the table.
        recipe: every option of the trainings, before the grid changes some.
        tune: the search before the grid, if any.
        grid: options with their values; all combinations are trained.
        seeds: each combination is trained with every one of them.
        metric: the number of ``result.json`` that is compared.
        x: key of the grid or number of ``result.json`` along the plot.
        line: key of the grid whose values are compared, one line each.
    """

    title: str
    recipe: dict[str, Any]
    tune: Tune | None
    grid: dict[str, list[Any]]
    seeds: list[int]
    metric: str
    x: str
    line: str

    @property
    def higher_is_better(self) -> bool:
        """Of the metric."""
        return self.metric not in LOWER_IS_BETTER

    def cells(self, tuned: Mapping[str, Any]) -> list[Cell]:
        """The trainings of the grid, all combinations with one seed before the next: a first picture comes early."""
        every = list(itertools.product(self.seeds, combinations(self.grid)))
        return [self._cell("", options, seed, tuned) for seed, options in every]

    def tuning(self) -> list[Cell]:
        """The trainings of the search before the grid."""
        if self.tune is None:
            return []
        every = itertools.product(combinations(self.tune.grid), self.tune.seeds)
        return [self._cell("tune,", options, seed, self.tune.fixed) for options, seed in every]

    def _cell(self, prefix: str, options: dict[str, Any], seed: int, common: Mapping[str, Any]) -> Cell:
        merged = put(put(self.recipe, common), options) | {"seed": seed}
        return Cell(prefix + run_key(options, seed), options, seed, as_recipe(merged))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in a study's file."""
        return {
            "title": self.title,
            "recipe": self.recipe,
            "tune": None if self.tune is None else asdict(self.tune),
            "grid": self.grid,
            "seeds": self.seeds,
            "metric": self.metric,
            "plot": {"x": self.x, "line": self.line},
        }


def combinations(grid: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """All of a grid's, the last key's values changing fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def put(options: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The options with some changed; a change of ``a.b`` changes b in the mapping a."""
    changed = dict(options)
    for key in sorted(changes, key=lambda key: "." in key):  # into mappings once they are there
        name, _, inner = key.partition(".")
        changed[name] = {**changed[name], inner: changes[key]} if inner else changes[key]
    return changed


def as_recipe(options: Mapping[str, Any]) -> Recipe:
    """The recipe of plain options."""
    data = options["data"]
    return Recipe(**{**options, "data": None if data is None else Path(data)})


def run_key(options: Mapping[str, Any], seed: int) -> str:
    """A readable name that is safe for a file: ``model=resnet14,model_options.width=0.5,seed=0``.

    It depends on nothing but the options and the seed, so that a study that grows finds its runs again. Where a value
    had to be changed or cut, a hash tells it from others.
    """
    values = {key: as_text(options[key]) for key in sorted(options)}
    safe = {key: re.sub(r"[^A-Za-z0-9._-]", "-", value) for key, value in values.items()}
    key = ",".join(f"{name}={value}" for name, value in (*safe.items(), ("seed", seed)))
    if safe == values and len(key) <= KEY_LENGTH:
        return key
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]
    tail = f",{digest},seed={seed}"
    return key.removesuffix(f",seed={seed}")[: KEY_LENGTH - len(tail)] + tail


def as_text(value: Any) -> str:
    """A value as a file of YAML has it."""
    return value if isinstance(value, str) else json.dumps(value)


def changes(before: Plan, now: Plan) -> list[str]:
    """What keeps one study from going on as another: all but more values and seeds, and how the result is shown."""
    found = [
        f"recipe.{name}: {before.recipe[name]!r} then, {now.recipe[name]!r} now"
        for name in now.recipe
        if name in before.recipe and name not in MAY_DIFFER and before.recipe[name] != now.recipe[name]
    ]
    if before.tune != now.tune:
        found += [f"tune: {_tune(before)} then, {_tune(now)} now"]
    if before.metric != now.metric:
        found += [f"metric: {before.metric} then, {now.metric} now"]
    if set(before.grid) != set(now.grid):
        found += [f"grid: {', '.join(before.grid)} then, {', '.join(now.grid)} now"]
    else:
        for key in before.grid:
            found += _lost(f"grid.{key}", before.grid[key], now.grid[key])
    return found + _lost("seeds", before.seeds, now.seeds)


def _tune(plan: Plan) -> str:
    return "none" if plan.tune is None else json.dumps(asdict(plan.tune))


def _lost(key: str, before: Iterable[Any], now: list[Any]) -> list[str]:
    lost = [as_text(value) for value in before if value not in now]
    return [f"{key}: {', '.join(lost)} then, no more now"] if lost else []


def shipped_plans() -> dict[str, Path]:
    """The package's studies by name."""
    folder = Path(str(resources.files("sasa.study") / "plans"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
