"""A whole study: its plan is checked, its options are tuned, its grid is trained, its results are gathered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from ..train import OutputError, Stopped
from ..train.checkpoints import write_whole
from ..train.fit import prepare_folder
from .gather import choose, gather
from .machine import machine
from .plan import Plan, StudyError, changes
from .processes import Interrupted, Processes, alone_in, find_slots
from .read import check_trainings, find_plan, read_plan
from .schedule import Scheduler


class TrainingsFailed(RuntimeError):  # noqa: N818
    """Some trainings of a study came to no result: the message names them."""


def study(plan: Path, out: Path | None = None, parallel: int = 1) -> dict[str, Any]:
    """Train a grid of networks, options and seeds, and gather means and standard deviations.

    Started again, it leaves out what is finished and goes on with what was cut off. Writes to ``out``: ``runs/`` (each
    training with its recipe and log), ``results.json``, ``table.md`` and ``plot.png``; ``plan.json``, ``tuned.json``,
    ``machines.json`` and ``optuna.log`` keep what was done.

    Args:
        plan: a study of the package (widths) or a YAML file.
        out: folder to write to; left out, runs and the plan's name.
        parallel: trainings at once on a CPU, which share its cores; with GPUs, on each of them.

    Returns:
        What is in results.json.

    Raises:
        StudyError: something in the plan can't be meant, or the folder holds another study.
        OutputError: out can't be written, or another study works in it.
        TrainingsFailed: some trainings came to no result; the others did.
        Stopped: a signal asked to stop; what ran has saved.
    """
    path = find_plan(plan)
    laid_out = read_plan(path)
    check_trainings(laid_out, path)
    if parallel < 1:
        raise StudyError(f"parallel: expected at least 1, got {parallel}")
    out = Path("runs") / path.stem if out is None else out
    prepare_folder(out, overwrite=False, resume=True)
    with alone_in(out):
        _check_same(laid_out, path, out)
        _write(out / "plan.json", laid_out.as_dict())
        slots = find_slots(parallel, laid_out.recipe["accelerator"] == "cpu")
        _note_machine(out, machine(slots))
        processes = Processes(slots)
        with processes.listening():
            try:
                failures = _train(laid_out, out, Scheduler(out, laid_out, slots, processes))
            except Interrupted:
                failures = {}
        results = gather(out)
    if processes.signalled:
        stopped = Stopped(f"stopped by {processes.signalled.name}; the same command goes on with the study in {out}")
        stopped.code = 128 + processes.signalled
        raise stopped
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


def _train(plan: Plan, out: Path, scheduler: Scheduler) -> dict[str, str]:
    """Train the grid, with options that are tuned first; returns the failures of both."""
    failures: dict[str, str] = {}
    tuned: dict[str, Any] = {}
    chosen = out / "tuned.json"
    if chosen.is_file():
        tuned = json.loads(chosen.read_text())
    elif plan.tune is not None:
        failures = scheduler.run("tuning", plan.tuning())
        scheduler.processes.check()
        best = choose(plan, out)
        if best is None:
            return failures
        tuned = best
        # Kept for good: the trainings of the grid have it.
        _write(chosen, tuned)
    failures |= scheduler.run("grid", plan.cells(tuned))
    return failures


def _check_same(plan: Plan, path: Path, out: Path) -> None:
    before = out / "plan.json"
    if not before.is_file():
        if any(one.name != "lock" for one in out.iterdir()):
            raise OutputError(f"out: expected an empty folder or one with a study, got {out}")
        return
    changed = changes(read_plan(before), plan)
    if changed:
        raise StudyError(
            f"{path}: {out} holds another study; expected its plan, with more values and seeds or without, got "
            f"{'; '.join(changed)}"
        )


def _note_machine(out: Path, found: dict[str, Any]) -> None:
    """Add this machine to those that the study has been on."""
    path = out / "machines.json"
    before = json.loads(path.read_text()) if path.is_file() else []
    if found not in before:
        _write(path, [*before, found])


def _write(path: Path, value: Any) -> None:
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())
