"""The plan of a study: a grid of options and seeds, preceded by a search, expanded into named training runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..train import UserError

LOWER_IS_BETTER = frozenset(("val_loss", "seconds_per_epoch"))

KEY_LENGTH = 160
"""Longest name of a run: its file names are longer, and file systems allow 255 bytes."""


class StudyError(UserError, ValueError):
    """An error in a plan: the message names the file, the key, what was expected and what was given."""


@dataclass(frozen=True)
class Training:
    """One training run of a study.

    Attributes:
        key: its name, and that of its files.
        options: what distinguishes it besides the seed; a key ``a.b`` is b in the mapping a.
        seed: of the training run.
        recipe: all of its options.
    """

    key: str
    options: dict[str, Any]
    seed: int
    recipe: dict[str, Any]


@dataclass(frozen=True)
class Search:
    """A grid trained before the study's own, which uses the best of its options.

    Attributes:
        fixed: options that apply only to these runs.
        grid: the options to search, with the values to try.
        seeds: of each combination.
    """

    fixed: dict[str, Any]
    grid: dict[str, list[Any]]
    seeds: list[int]


@dataclass(frozen=True)
class StudyPlan:
    """A study.

    Attributes:
        title: of the plot and the table.
        recipe: every option of the runs, before the grid changes some.
        tune: the search before the grid, if any.
        grid: options with their values; all combinations are trained.
        seeds: each combination is trained with every one of them.
        metric: the number of ``result.json`` that is compared.
        plot: ``x``, a key of the grid or number of ``result.json``; ``line``, the key whose values are compared.
    """

    title: str
    recipe: dict[str, Any]
    tune: Search | None
    grid: dict[str, list[Any]]
    seeds: list[int]
    metric: str
    plot: dict[str, str]

    def trainings(self, tuned: Mapping[str, Any]) -> list[Training]:
        """Runs of the grid, all combinations with one seed before the next, so that first results come early."""
        every = itertools.product(self.seeds, combinations(self.grid))
        return [self._training("", options, seed, tuned) for seed, options in every]

    def searched(self) -> list[Training]:
        """Runs of the search before the grid."""
        if self.tune is None:
            return []
        every = itertools.product(combinations(self.tune.grid), self.tune.seeds)
        return [self._training("tune,", options, seed, self.tune.fixed) for options, seed in every]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in a study's file."""
        return asdict(self)

    def _training(self, prefix: str, options: dict[str, Any], seed: int, common: Mapping[str, Any]) -> Training:
        recipe = merged(merged(self.recipe, common), options) | {"seed": seed}
        return Training(prefix + run_key(options, seed), options, seed, recipe)


def combinations(grid: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """All combinations of a grid, the last key's values changing fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def merged(options: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The options with some changed; a change of ``a.b`` changes b in the mapping a."""
    changed = dict(options)
    for key in sorted(changes, key=lambda key: "." in key):  # a itself comes first
        name, _, inner = key.partition(".")
        changed[name] = {**changed[name], inner: changes[key]} if inner else changes[key]
    return changed


def run_key(options: Mapping[str, Any], seed: int) -> str:
    """A readable name that is safe for a file: ``model=resnet14,model_options.width=0.5,seed=0``.

    It depends only on the options and the seed, so that an extended study finds its runs again. If a value had to be
    changed or truncated, a hash distinguishes it from others.
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
    """A value as in a YAML file."""
    return value if isinstance(value, str) else json.dumps(value)


def labels(values: list[Any]) -> list[str]:
    """The values as text; of mappings, only what they don't all have in common."""
    if not values or not all(isinstance(value, dict) for value in values):
        return [as_text(value) for value in values]
    common = {key for key in values[0] if all(key in value and value[key] == values[0][key] for value in values)}
    return [", ".join(f"{k} {as_text(v)}" for k, v in value.items() if k not in common) or "{}" for value in values]


def changes(before: StudyPlan, now: StudyPlan) -> list[str]:
    """Why ``now`` can't continue ``before``. It may add values and seeds, and present the result differently."""
    from ..train.recipe import FREE_TO_CHANGE

    # The images of one run may move, but runs on different images are not compared.
    free = FREE_TO_CHANGE - {"data", "strict"}
    pairs = [(f"recipe.{name}", before.recipe.get(name, value), value) for name, value in now.recipe.items()]
    pairs = [pair for pair in pairs if pair[0].removeprefix("recipe.") not in free]
    pairs += [(name, getattr(before, name), getattr(now, name)) for name in ("tune", "metric")]
    pairs += [("grid", sorted(before.grid), sorted(now.grid))]
    found = [f"{name}: {_shown(then)} before, {_shown(value)} now" for name, then, value in pairs if then != value]
    grown = [(f"grid.{key}", before.grid[key], now.grid[key]) for key in before.grid if key in now.grid]
    for name, then, values in (*grown, ("seeds", before.seeds, now.seeds)):
        lost = [as_text(value) for value in then if value not in values]
        found += [f"{name}: without {', '.join(lost)} now"] if lost else []
    return found


def _shown(value: Any) -> str:
    return as_text(asdict(value) if isinstance(value, Search) else value)
