"""The trainings of a study as trials of Optuna's, which keeps in a journal what is finished, failed and to be done."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .._extras import require
from ..train import OutputError
from ..train.checkpoints import write_whole
from .gather import formatted, read_result
from .plan import Cell, Plan
from .processes import Interrupted, Processes, Slots
from .progress import Board, tell

optuna = require("optuna", "study")

LINES = 12
"""Of a failed training's log that are shown."""


class _Failed(Exception):  # noqa: N818
    """A training came to no result."""


class Scheduler:
    """Runs trainings in ``out``.

    Args:
        out: the study's folder; each training has ``runs/KEY``, and its recipe and log beside it.
        plan: the study.
        slots: where trainings run at once.
        processes: that run them.
    """

    def __init__(self, out: Path, plan: Plan, slots: Slots, processes: Processes) -> None:
        self.out, self.plan, self.slots, self.processes = out, plan, slots, processes
        self.runs = out / "runs"
        self.runs.mkdir(exist_ok=True)

    def run(self, stage: str, cells: list[Cell]) -> dict[str, str]:
        """Train what is not finished; returns why some came to no result, by their names.

        Args:
            stage: name of the study in Optuna's journal.
            cells: the trainings.
        """
        failures: dict[str, str] = {}
        with _quiet():
            study = self._open(stage)
            waiting = self._enqueue(study, cells)
            if not waiting:
                tell(f"{stage}: all {len(cells)} finished before")
                return failures
            board = Board(stage, len(cells), len(cells) - waiting, len(self.slots.gpus))
            by_key = {cell.key: cell for cell in cells}

            def objective(trial: Any) -> float:
                return self._train(trial, by_key[trial.user_attrs["key"]], board, failures)

            try:
                with board:
                    study.optimize(objective, waiting, n_jobs=len(self.slots.gpus), catch=(_Failed, Interrupted))
            except OSError as error:
                raise OutputError(f"out: can't write to {self.out}: {error.strerror}") from error
        return failures

    def _open(self, stage: str) -> Any:
        journal = self.out.absolute() / "optuna.log"
        try:
            _mend(journal)
            storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
            return optuna.create_study(
                study_name=stage,
                storage=storage,
                sampler=optuna.samplers.RandomSampler(seed=0),  # which is never asked: all trials are given
                direction="maximize" if self.plan.higher_is_better else "minimize",
                load_if_exists=True,
            )
        except (ValueError, KeyError, OSError) as error:
            raise OutputError(
                f"out: {journal} can't be read: {error}; without it, finished trainings are found again one by one"
            ) from error

    def _enqueue(self, study: Any, cells: list[Cell]) -> int:
        """Queue a trial for every training that is not finished; returns how many are in the queue."""
        states = optuna.trial.TrialState
        trials = study.get_trials(deepcopy=False)
        # Left so by a scheduler that was killed; they go on from their checkpoints as other trials.
        left = [trial for trial in trials if trial.state == states.RUNNING]
        logs = {self.runs / f"{one.user_attrs['key']}.log": one.user_attrs.get("process") for one in left}
        self.processes.end_left_over(logs, tell)
        for trial in left:
            study.tell(trial.number, state=states.FAIL)
        finished, queued = set(), set()
        for trial in trials:
            key = trial.user_attrs["key"]
            if trial.state == states.WAITING:
                queued.add(key)
            elif trial.state == states.COMPLETE and read_result(self.out, key) is not None:
                finished.add(key)
        for cell in cells:
            if cell.key not in finished | queued:
                study.enqueue_trial({**cell.options, "seed": cell.seed}, user_attrs={"key": cell.key})
                queued.add(cell.key)
        return len(queued)

    def _train(self, trial: Any, cell: Cell, board: Board, failures: dict[str, str]) -> float:
        """The metric that a training comes to."""
        began = time.monotonic()
        board.began(cell.key)
        try:
            value = self._value(trial, cell)
        except Interrupted:
            trial.study.stop()
            raise
        except _Failed as error:
            trial.set_user_attr("error", str(error))
            failures[cell.key] = str(error)
            board.failed(cell.key, str(error))
            raise
        board.finished(cell.key, formatted(self.plan.metric, value), time.monotonic() - began)
        return value

    def _value(self, trial: Any, cell: Cell) -> float:
        config, log, out = (self.runs / f"{cell.key}{end}" for end in (".yaml", ".log", ""))
        write_whole(config, yaml.safe_dump(cell.recipe.as_dict(), sort_keys=False).encode())
        status = self.processes.run(
            ["--config", str(config), "--out", str(out), "--resume", "auto"],
            log,
            lambda process: trial.set_user_attr("process", process),
        )
        if status:
            raise _Failed(f"exit status {status}; {log} ends with\n{_last_lines(log)}")
        result = read_result(self.out, cell.key)
        value = None if result is None else result.get(self.plan.metric)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise _Failed(f"expected {self.plan.metric} in {out / 'result.json'}, got {value!r}")
        return float(value)


def _mend(journal: Path) -> None:
    """Undo what a process leaves that is killed while it writes: half of a line, and Optuna's lock.

    The study's own lock is held, so nobody writes now. Optuna would wait half a minute for its lock, and refuse a
    journal that goes on after half of a line.
    """
    journal.with_name(journal.name + ".lock").unlink(missing_ok=True)
    if journal.exists():
        written = journal.read_bytes()
        whole = written[: written.rfind(b"\n") + 1]
        if whole != written:
            write_whole(journal, whole)


def _last_lines(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in lines[-LINES:])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's lines on each trial: failures are told here, with the ends of their logs."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
