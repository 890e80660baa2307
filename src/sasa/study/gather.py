"""Results of a study: means and deviations over the seeds, differences between lines, as JSON, table and plot."""

from __future__ import annotations

import io
import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..train import OutputError
from .machine import machine_line
from .plan import LOWER_IS_BETTER, StudyError, StudyPlan, Training, as_text, labels
from .read import read_plan

ALSO = {"ap": ("ap50",)}
"""Further figures of the same runs that are shown next to a metric."""

PERCENT = frozenset(("top1", "top5", "ap", "ap50", "ap75"))


def gather(out: Path) -> dict[str, Any]:
    """Gather the results of a study so far, finished or not.

    Writes ``results.json``, ``table.md`` and ``plot.png`` to ``out``.

    Args:
        out: the study's folder.

    Returns:
        What is in results.json.

    Raises:
        StudyError: there is no study in the folder.
    """
    from .._files import write_whole
    from .plot import plot

    if not (out / "plan.json").is_file():
        raise StudyError(f"out: expected the folder of a study, got {out}")
    plan = read_plan(out / "plan.json")
    tuned = read_json(out / "tuned.json", {})
    cells = _cells(plan, out, plan.trainings(tuned))
    results = {
        "title": plan.title,
        "metric": plan.metric,
        "plan": plan.as_dict(),
        "tuned": {"options": tuned, "cells": _cells(plan, out, plan.searched())} if plan.tune else None,
        "cells": cells,
        "differences": _differences(plan, cells),
        "machines": read_json(out / "machines.json", []),
    }
    write_whole(out / "results.json", (json.dumps(results, indent=2, allow_nan=False) + "\n").encode())
    write_whole(out / "table.md", table(results).encode())
    picture = io.BytesIO()
    plot(results).savefig(picture, dpi=150)
    write_whole(out / "plot.png", picture.getvalue())
    return results


def read_json(path: Path, default: Any) -> Any:
    """The contents of a file that the study wrote earlier, of the default's type, or the default if there is none."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return default
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"out: {path} can't be read: {error}") from error
    if type(found) is not type(default):
        raise OutputError(f"out: expected a {type(default).__name__} in {path}, got a {type(found).__name__}")
    return found


def metric_of(plan: StudyPlan, out: Path, training: Training) -> float:
    """The result of a training run.

    Raises:
        ValueError: there is none, or it is not a finite number.
    """
    path = out / "runs" / training.key / "result.json"
    value: Any = _result(path).get(plan.metric)
    if not _finite(value):
        raise ValueError(f"expected {plan.metric} in {path}, got {value!r}")
    return value


def choose(plan: StudyPlan, out: Path) -> dict[str, Any]:
    """The tuned options with the best mean, among those whose runs all have a result; {} if there are none."""
    whole = [cell for cell in _cells(plan, out, plan.searched()) if not cell["missing_seeds"]]
    best = min if plan.metric in LOWER_IS_BETTER else max
    return best(whole, key=lambda cell: cell["mean"])["options"] if whole else {}


def formatted(metric: str, value: float) -> str:
    """A value of the metric, formatted for readers."""
    return f"{value:.1%}" if metric in PERCENT else f"{value:.4g}"


def _result(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _cells(plan: StudyPlan, out: Path, trainings: Sequence[Training]) -> list[dict[str, Any]]:
    """The runs grouped by equal options, in the order of the plan."""
    groups: dict[str, list[Training]] = {}
    for training in trainings:
        groups.setdefault(json.dumps(training.options), []).append(training)
    return [_cell(plan, out, group) for group in groups.values()]


def _cell(plan: StudyPlan, out: Path, trainings: list[Training]) -> dict[str, Any]:
    results = {one.seed: _result(out / "runs" / one.key / "result.json") for one in trainings}
    results = {seed: result for seed, result in results.items() if _finite(result.get(plan.metric))}

    def mean(name: str) -> float | None:
        numbers = [result[name] for result in results.values() if _finite(result.get(name))]
        return statistics.mean(numbers) if numbers else None

    values = {str(seed): result[plan.metric] for seed, result in results.items()}
    options = trainings[0].options
    x = plan.plot["x"]
    return {
        "options": options,
        "n": len(values),
        "mean": statistics.fmean(values.values()) if values else None,
        "standard_deviation": statistics.stdev(values.values()) if len(values) > 1 else None,
        "values": values,
        "also": {
            name: _spread([result.get(name) for result in results.values()]) for name in ALSO.get(plan.metric, ())
        },
        "missing_seeds": [one.seed for one in trainings if one.seed not in results],
        "parameters": mean("parameters"),
        "flops": mean("flops"),
        "seconds_per_epoch": mean("seconds_per_epoch"),
        "x": options[x] if x in options else mean(x),
    }


def _spread(values: list[Any]) -> dict[str, float | None]:
    """Mean and deviation, if there are values."""
    numbers = [value for value in values if _finite(value)]
    mean = statistics.fmean(numbers) if numbers else None
    return {"mean": mean, "standard_deviation": statistics.stdev(numbers) if len(numbers) > 1 else None}


def _differences(plan: StudyPlan, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Differences of means between any two values of the line's key, other options equal, with Welch's error."""
    line = plan.plot["line"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        others = {key: value for key, value in cell["options"].items() if key != line}
        groups.setdefault(json.dumps(others), []).append(cell)
    return [
        {"options": json.loads(others)}
        | {"first": first["options"][line], "second": second["options"][line]}
        | welch(first, second)
        for others, group in groups.items()
        for first, second in itertools.combinations(group, 2)
    ]


def welch(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Welch's (1947) comparison of two means with unequal variances; chance: half of the 95 % confidence interval."""
    from scipy import stats

    found: dict[str, Any] = dict.fromkeys(("difference", "standard_error", "degrees_of_freedom", "chance"))
    values = [list(cell["values"].values()) for cell in (first, second)]
    if not all(values):
        return found
    found["difference"] = first["mean"] - second["mean"]
    if min(map(len, values)) > 1:
        found["standard_error"] = math.hypot(*(stats.sem(of_cell) for of_cell in values))
    if found["standard_error"]:
        test = stats.ttest_ind(*values, equal_var=False)
        low, high = test.confidence_interval(0.95)
        found |= {"degrees_of_freedom": float(test.df), "chance": float(high - low) / 2}  # type: ignore[attr-defined]
    return found


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    plan, metric, tuned = results["plan"], results["metric"], results["tuned"]
    line = plan["plot"]["line"]

    def number(value: float | None, form: str, scale: float = 1) -> str:
        return "" if value is None else f"{value * scale:{form}}"

    keys, also = list(plan["grid"]), ALSO.get(metric, ())
    names = {
        (key, as_text(v)): name for key, of in plan["grid"].items() for v, name in zip(of, labels(of), strict=True)
    }

    def named(options: dict[str, Any]) -> list[str]:
        return [names.get((key, as_text(value)), as_text(value)) for key, value in options.items()]

    parts = [
        f"# {results['title']}",
        _markdown(
            keys,
            (
                f"{metric}, mean ± standard deviation (seeds)",
                *also,
                "parameters",
                "MFLOPs per image",
                "seconds per epoch",
            ),
            [
                (
                    *named(cell["options"]),
                    _mean(metric, cell),
                    *(_words(name, cell["also"][name]) for name in also),
                    number(cell["parameters"], ",.0f"),
                    number(cell["flops"], ".2f", 1e-6),
                    number(cell["seconds_per_epoch"], ".1f"),
                )
                for cell in results["cells"]
            ],
        ),
    ]
    if results["differences"]:
        scale, digits, unit = (100, ".1f", " points") if metric in PERCENT else (1, ".4g", "")
        rows = []
        for one in results["differences"]:
            error = number(one["standard_error"], f"{digits}", scale)
            difference = number(one["difference"], f"+{digits}", scale) + (f" ± {error}" if error else "")
            shown = (f"{text}{unit}" if text else "" for text in (difference, number(one["chance"], digits, scale)))
            pair = (named({line: one[which]})[0] for which in ("first", "second"))
            rows.append((*named(one["options"]), *pair, *shown))
        left = (*(key for key in keys if key != line), f"{line}: first", "second")
        parts += [
            _markdown(left, (f"{metric}, difference ± standard error", "by chance, up to"), rows),
            "By chance: if only the seeds mattered, 95% of differences would be smaller than this (Welch).",
        ]
    if tuned:
        chosen, fixed = (
            ", ".join(f"{key} {as_text(value)}" for key, value in options.items())
            for options in (tuned["options"], plan["tune"]["fixed"])
        )
        rows = [(*cell["options"].values(), _mean(metric, cell)) for cell in tuned["cells"]]
        parts += [
            f"Chosen for all runs: {chosen or 'nothing yet'}, from these runs{f' of {fixed}' if fixed else ''}:",
            _markdown(list(plan["tune"]["grid"]), (f"{metric} (seeds)",), rows),
        ]
    return "\n\n".join([*parts, *(f"Trained on {machine_line(one)}." for one in results["machines"])]) + "\n"


def _mean(metric: str, cell: dict[str, Any]) -> str:
    total = cell["n"] + len(cell["missing_seeds"])
    count = f"({cell['n']})" if cell["n"] == total else f"({cell['n']} of {total})"
    return f"{_words(metric, cell)} {count}".strip()


def _words(metric: str, spread: dict[str, Any]) -> str:
    return " ± ".join(formatted(metric, spread[n]) for n in ("mean", "standard_deviation") if spread[n] is not None)


def _markdown(left: Sequence[str], right: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table whose right-hand columns are numbers."""
    lines = [(*left, *right), (":--",) * len(left) + ("--:",) * len(right), *rows]
    return "\n".join(f"| {' | '.join(as_text(word).replace('|', '&#124;') for word in line)} |" for line in lines)
