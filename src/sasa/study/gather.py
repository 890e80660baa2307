"""What a study came to: means and deviations over the seeds, differences between lines, as JSON, table and plot."""

from __future__ import annotations

import io
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..train.checkpoints import write_whole
from .machine import in_words
from .plan import PERCENT, Cell, Plan, StudyError, as_text
from .read import read_plan

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t that chance exceeds, to either side, once in 20 times: for 1 to 10 degrees of freedom."""


def gather(out: Path) -> dict[str, Any]:
    """Gather what a study's trainings came to so far, finished or not.

    Writes ``results.json``, ``table.md`` and ``plot.png`` to ``out``.

    Args:
        out: the study's folder.

    Returns:
        What is in results.json.

    Raises:
        StudyError: there is no study.
    """
    from .plot import plot

    if not (out / "plan.json").is_file():
        raise StudyError(f"out: expected the folder of a study, got {out}")
    plan = read_plan(out / "plan.json")
    tuned = _read(out / "tuned.json", {})
    cells = _cells(plan, out, plan.cells(tuned))
    tuning = _cells(plan, out, plan.tuning())
    results = {
        "title": plan.title,
        "metric": plan.metric,
        "plan": plan.as_dict(),
        "tuned": {"options": tuned, "cells": tuning} if tuning else None,
        "cells": cells,
        "differences": _differences(plan, cells),
        "machines": _read(out / "machines.json", []),
    }
    write_whole(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    write_whole(out / "table.md", table(results).encode())
    picture = io.BytesIO()
    plot(results).savefig(picture, dpi=150)
    write_whole(out / "plot.png", picture.getvalue())
    return results


def read_result(out: Path, key: str) -> dict[str, Any] | None:
    """What a training came to, or None."""
    try:
        return json.loads((out / "runs" / key / "result.json").read_text())
    except (OSError, ValueError):
        return None


def choose(plan: Plan, out: Path) -> dict[str, Any] | None:
    """The tuned options of the best mean, among those whose trainings have all come to a result."""
    if plan.tune is None:
        return None
    whole = [cell for cell in _cells(plan, out, plan.tuning()) if cell["n"] == len(plan.tune.seeds)]
    best = max if plan.higher_is_better else min
    return best(whole, key=lambda cell: cell["mean"])["options"] if whole else None


def formatted(metric: str, value: float) -> str:
    """A value of the metric as readers want it."""
    return f"{value:.1%}" if metric in PERCENT else f"{value:.4g}"


def _read(path: Path, otherwise: Any) -> Any:
    return json.loads(path.read_text()) if path.is_file() else otherwise


def _cells(plan: Plan, out: Path, trainings: Sequence[Cell]) -> list[dict[str, Any]]:
    """The trainings of equal options together, in the order of the plan."""
    found: dict[str, dict[str, Any]] = {}
    for training in trainings:
        name = json.dumps(training.options)
        cell = found.setdefault(name, {"options": training.options, "results": {}, "missing": []})
        result = read_result(out, training.key) or {}
        value = result.get(plan.metric)
        if isinstance(value, (int, float)) and math.isfinite(value):
            cell["results"][str(training.seed)] = result
        else:
            cell["missing"].append(training.seed)
    return [_summary(plan, cell["options"], cell["results"], cell["missing"]) for cell in found.values()]


def _summary(plan: Plan, options: dict[str, Any], results: dict[str, dict[str, Any]], missing: list[int]) -> dict:
    values = {seed: result[plan.metric] for seed, result in results.items()}

    def mean(name: str) -> float | None:
        numbers = [result[name] for result in results.values() if name in result]
        return statistics.mean(numbers) if numbers else None

    return {
        "options": options,
        "n": len(values),
        "mean": statistics.fmean(values.values()) if values else None,
        "standard_deviation": statistics.stdev(values.values()) if len(values) > 1 else None,
        "values": values,
        "missing_seeds": missing,
        "parameters": mean("parameters"),
        "flops": mean("flops"),
        "seconds_per_epoch": mean("seconds_per_epoch"),
        "x": options[plan.x] if plan.x in options else mean(plan.x),
    }


def _differences(plan: Plan, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the means, between any two values of the line's key at equal other options, with Welch's standard error."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        others = {key: value for key, value in cell["options"].items() if key != plan.line}
        groups.setdefault(json.dumps(others), []).append(cell)
    found = []
    for others, group in groups.items():
        for first, second in itertools.combinations(group, 2):
            pair = {"first": first["options"][plan.line], "second": second["options"][plan.line]}
            found.append({"options": json.loads(others), **pair, **_welch(first, second)})
    return found


def _welch(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two means of unequal deviations: Welch, 1947; the degrees of freedom are Satterthwaite's."""
    found: dict[str, Any] = dict.fromkeys(("difference", "standard_error", "degrees_of_freedom", "chance"))
    if first["n"] and second["n"]:
        found["difference"] = first["mean"] - second["mean"]
    if first["n"] < 2 or second["n"] < 2:
        return found
    squares = [cell["standard_deviation"] ** 2 / cell["n"] for cell in (first, second)]
    found["standard_error"] = error = math.sqrt(sum(squares))
    spread = sum(square**2 / (cell["n"] - 1) for square, cell in zip(squares, (first, second), strict=True))
    if spread:
        found["degrees_of_freedom"] = freedom = sum(squares) ** 2 / spread
        found["chance"] = error * T_975[max(0, min(math.floor(freedom), len(T_975)) - 1)]
    return found


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    plan, metric = results["plan"], results["metric"]
    keys, line = list(plan["grid"]), plan["plot"]["line"]
    parts = [f"# {results['title']}"]
    head = (*keys, f"{metric}, mean ± standard deviation (seeds)", "parameters", "MFLOPs an image", "seconds an epoch")
    rows = [
        (
            *(as_text(cell["options"][key]) for key in keys),
            _mean(metric, cell),
            "" if cell["parameters"] is None else f"{cell['parameters']:,.0f}",
            "" if cell["flops"] is None else f"{cell['flops'] / 1e6:.2f}",
            "" if cell["seconds_per_epoch"] is None else f"{cell['seconds_per_epoch']:.1f}",
        )
        for cell in results["cells"]
    ]
    parts.append(_markdown(head, rows, len(keys)))
    if results["differences"]:
        others = [key for key in keys if key != line]
        head = (*others, f"{line}: first", "second", f"{metric}, difference ± standard error", "by chance, up to")
        rows = [
            (
                *(as_text(found["options"][key]) for key in others),
                as_text(found["first"]),
                as_text(found["second"]),
                *_difference(metric, found),
            )
            for found in results["differences"]
        ]
        parts.append(_markdown(head, rows, len(others) + 2))
        parts.append("By chance: what differences stay below 19 times in 20 if they are the seeds' alone (Welch).")
    if results["tuned"]:
        tuned = results["tuned"]
        keys = list(plan["tune"]["grid"])
        rows = [(*(as_text(cell["options"][key]) for key in keys), _mean(metric, cell)) for cell in tuned["cells"]]
        chosen = ", ".join(f"{key} {as_text(value)}" for key, value in tuned["options"].items()) or "nothing yet"
        fixed = ", ".join(f"{key} {as_text(value)}" for key, value in plan["tune"]["fixed"].items())
        parts.append(f"Chosen for all of them: {chosen}, of these{f' with {fixed}' if fixed else ''}:")
        parts.append(_markdown((*keys, f"{metric} (seeds)"), rows, len(keys)))
    parts += [f"Trained on {in_words(found)}." for found in results["machines"]]
    return "\n\n".join(parts) + "\n"


def _mean(metric: str, cell: dict[str, Any]) -> str:
    total = cell["n"] + len(cell["missing_seeds"])
    count = f"({cell['n']})" if cell["n"] == total else f"({cell['n']} of {total})"
    if cell["mean"] is None:
        return count
    deviation = cell["standard_deviation"]
    spread = "" if deviation is None else f" ± {formatted(metric, deviation)}"
    return f"{formatted(metric, cell['mean'])}{spread} {count}"


def _difference(metric: str, found: dict[str, Any]) -> tuple[str, str]:
    difference, error = found["difference"], found["standard_error"]
    if difference is None:
        return "", ""
    scale, digits, unit = (100, ".1f", " points") if metric in PERCENT else (1, ".4g", "")
    text = f"{difference * scale:+{digits}}"
    if error is None:
        return text + unit, ""
    chance = "" if found["chance"] is None else f"{found['chance'] * scale:{digits}}{unit}"
    return f"{text} ± {error * scale:{digits}}{unit}", chance


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A table whose columns after the first ``left`` are numbers."""
    lines = [head, [":--" if index < left else "--:" for index in range(len(head))], *rows]
    return "\n".join(f"| {' | '.join(word.replace('|', '&#124;') for word in line)} |" for line in lines)
