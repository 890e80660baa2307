"""A complete study: validate its plan, tune its options, train its grid, gather its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from ..train import OutputError
from .gather import choose, formatted, gather, metric_of, read_json
from .machine import find_slots, study_machine
from .plan import StudyError, StudyPlan, Training, changes, combinations
from .read import check_trainings, find_plan, read_plan
from .trainings import TrainingProcesses


class TrainingsFailed(RuntimeError):  # noqa: N818
    """Some training runs of a study have no result: the message names them."""


def study(plan: Path, out: Path | None = None, parallel: int = 1) -> dict[str, Any]:
    """Train a grid of networks, options and seeds, and gather means and standard deviations.

    When restarted, it skips finished runs and resumes interrupted ones. Writes to ``out``: ``runs/`` (each with its
    recipe and log), ``results.json``, ``table.md`` and ``plot.png``; and ``plan.json``, ``tuned.json`` and
    ``machines.json``, which record what was done.

    Args:
        plan: a packaged study (widths) or a YAML file.
        out: folder to write to; default: runs/ followed by the plan's name.
        parallel: concurrent training runs on a CPU, which share its cores; with GPUs, on each of them.

    Returns:
        What is in results.json.

    Raises:
        StudyError: there is an error in the plan, or the folder contains another study.
        OutputError: out can't be written, or is in use by another study.
        TrainingsFailed: some training runs have no result; the others do.
        Stopped: a signal requested a stop; the active runs have saved their state.
    """
    from ..train import Stopped
    from ..train.fit import prepare_folder

    path = find_plan(plan)
    planned = read_plan(path)
    check_trainings(planned, path)
    if not 1 <= parallel <= 256:
        raise StudyError(f"parallel: expected at least 1 and at most 256, got {parallel}")
    out = Path("runs") / path.stem if out is None else out
    prepare_folder(out, overwrite=False, resume=True)
    processes = TrainingProcesses(out)
    try:
        with processes.alone():
            _check_same(planned, path, out)
            (out / "runs").mkdir(exist_ok=True)
            _write(out / "plan.json", planned.as_dict())
            failures = _train(planned, out, processes, parallel)
            results = gather(out)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"out: can't write to {out}: {error.strerror or error}") from error
    if processes.signalled:
        text = f"stopped by {processes.signalled.name}; the same command resumes the study in {out}"
        raise Stopped(text, processes.signalled)
    console = Console()
    console.print((out / "table.md").read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
    for name in ("results.json", "table.md", "plot.png"):
        console.print(f"wrote {out / name}", markup=False, highlight=False, soft_wrap=True)
    if failures:
        listed = "\n".join(f"  {key}: {reason.splitlines()[0]}" for key, reason in failures.items())
        raise TrainingsFailed(
            f"{len(failures)} of the trainings failed; the same command tries again, unless tuning is done:\n{listed}"
        )
    return results


def _train(plan: StudyPlan, out: Path, processes: TrainingProcesses, parallel: int) -> dict[str, str]:
    """Tune the options, then train the grid; returns the failures of both."""
    slots = find_slots(parallel, plan.recipe["accelerator"] == "cpu")
    here, before = study_machine(slots), read_json(out / "machines.json", [])
    if here not in before:
        _write(out / "machines.json", [*before, here])

    def result(training: Training) -> str:
        return formatted(plan.metric, metric_of(plan, out, training))

    failures: dict[str, str] = {}
    tuned = read_json(out / "tuned.json", {})
    if plan.tune is not None and not tuned:
        failures = processes.run("tuning", plan.searched(), slots, result)
        tuned = {} if processes.signalled else choose(plan, out)
        if not tuned:
            return failures
        _write(out / "tuned.json", tuned)  # final: the grid's runs depend on it
    elif plan.tune is not None and tuned not in combinations(plan.tune.grid):
        raise OutputError(f"out: expected options of tune.grid in {out / 'tuned.json'}, got {tuned}")
    return failures | processes.run("grid", plan.trainings(tuned), slots, result)


def _check_same(plan: StudyPlan, path: Path, out: Path) -> None:
    before = out / "plan.json"
    if not before.is_file():
        if any(one.name != ".lock" for one in out.iterdir()):
            raise OutputError(f"out: expected an empty folder or one with a study, got {out}")
        return
    changed = changes(read_plan(before), plan)
    if changed:
        raise StudyError(
            f"{path}: {out} holds another study; expected its plan, with more values and seeds or without, got "
            f"{'; '.join(changed)}"
        )


def _write(path: Path, value: Any) -> None:
    from .._files import write_whole

    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())
