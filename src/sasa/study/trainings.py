"""Training runs as separate processes, a limited number at a time, and how they are stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..train.checkpoints import alone_in, note_holders
from .machine import Slots
from .plan import Training

COMMAND = [sys.executable, "-m", "sasa", "train"]

STOPPING = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)

LINES = 12
"""Number of lines shown of a failed run's log."""

# Variables that a launcher sets for the processes of one training run; here each run is one process.
_LAUNCHERS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_LAUNCHERS_PREFIXES = ("SLURM_", "TORCHELASTIC_")


@dataclass
class _Started:
    training: Training
    gpu: str | None
    process: subprocess.Popen
    began: float


class TrainingProcesses:
    """Executes training runs in a study's folder, which no other study can use at the same time.

    Args:
        out: the folder; each run has ``runs/KEY``, with its recipe and log next to it.

    Attributes:
        signalled: the signal that requested a stop, if any.
    """

    def __init__(self, out: Path) -> None:
        self.signalled: signal.Signals | None = None
        self._out = out
        self._running: list[_Started] = []

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Context in which no other study uses the folder, and signals to stop are forwarded to the training runs.

        Raises:
            OutputError: the folder is in use by another study, or by runs that it left behind when it was killed.
        """
        with alone_in(self._out, 0.0, "study", inherited=True) as self._lock:
            before: dict[signal.Signals, Any] = {}
            if threading.current_thread() is threading.main_thread():
                for number in STOPPING:
                    if signal.getsignal(number) is not signal.SIG_IGN:  # as set by nohup
                        before[number] = signal.signal(number, self._stop)
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def run(
        self, stage: str, trainings: list[Training], slots: Slots, result: Callable[[Training], str]
    ) -> dict[str, str]:
        """Train what has no result yet, until all have ended or a signal requests a stop; returns failures by key.

        Args:
            stage: display name of this group of runs.
            trainings: all of them, finished or not.
            slots: for concurrent runs.
            result: returns a run's result in words; raises ValueError if it has none.
        """
        waiting = deque(training for training in trainings if _reason(result, training))
        done, began, left = len(trainings) - len(waiting), time.monotonic(), len(waiting)
        free, failures = list(slots.gpus), {}
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        task = bar.add_task(stage, total=len(trainings), completed=done)
        if done:
            console.print(f"{stage}: {done} of {len(trainings)} finished before")
        try:
            with bar:
                while self._running or (waiting and not self.signalled):
                    while waiting and free and not self.signalled:
                        self._start(waiting.popleft(), free.pop(0), slots.threads)
                    time.sleep(0.02)
                    for one in [one for one in self._running if one.process.poll() is not None]:
                        self._running.remove(one)
                        free.append(one.gpu)
                        key, status = one.training.key, one.process.returncode
                        if status and self.signalled:
                            continue
                        left -= 1
                        bar.advance(task)
                        reason = self._failure(key, status) if status else _reason(result, one.training)
                        seconds = (time.monotonic() - began) * left / (len(trainings) - done - left)
                        line = f"{stage}: {len(trainings) - left} of {len(trainings)}"
                        line += f", about {_duration(seconds)} left: {key}" if left else f": {key}"
                        if reason:
                            failures[key] = reason
                            console.print(Text(f"{line} failed: {reason}", "red"), soft_wrap=True)
                        else:
                            took = _duration(time.monotonic() - one.began)
                            console.print(Text(f"{line}: {result(one.training)} in {took}"), soft_wrap=True)
        finally:
            for one in self._running:
                one.process.terminate()
            for one in self._running:
                one.process.wait()
            self._running.clear()
        return failures

    def _start(self, training: Training, gpu: str | None, threads: int) -> None:
        runs = self._out / "runs"
        environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHERS}
        environment = {name: value for name, value in environment.items() if not name.startswith(_LAUNCHERS_PREFIXES)}
        environment |= {"OMP_NUM_THREADS": str(threads)} | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        config = runs / f"{training.key}.yaml"
        config.write_text(yaml.safe_dump(training.recipe, sort_keys=False))
        with (runs / f"{training.key}.log").open("ab") as log:
            process = subprocess.Popen(  # noqa: S603
                [*COMMAND, "--config", str(config), "--out", str(runs / training.key), "--resume", "auto"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=0,  # Ctrl-C goes to this process, which forwards it
                pass_fds=(self._lock.fileno(),),  # the folder stays locked while the run is alive
            )
        self._running.append(_Started(training, gpu, process, time.monotonic()))
        if self.signalled:  # before it could be forwarded
            process.terminate()
        note_holders(self._lock, os.getpid(), *(one.process.pid for one in self._running))

    def _stop(self, number: int, frame: Any) -> None:
        again, self.signalled = self.signalled is not None, signal.Signals(number)
        for one in self._running:
            with contextlib.suppress(ProcessLookupError):
                if again:
                    os.killpg(one.process.pid, signal.SIGKILL)
                else:  # to the run's main process only: it would take its workers' deaths for a failure
                    one.process.terminate()
        if self._running and not again:
            # Not through rich, whose locks the interrupted code may hold.
            os.write(2, f"\n{self.signalled.name}: waiting for trainings to save; again ends them at once\n".encode())

    def _failure(self, key: str, status: int) -> str:
        log = self._out / "runs" / f"{key}.log"
        text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
        lines = [f"  {line.rstrip()}" for line in text.splitlines() if line.strip()]
        return "\n".join((f"exit status {status}; {log} ends with", *lines[-LINES:]))


def _reason(result: Callable[[Training], str], training: Training) -> str | None:
    """Why the run has no result, or None."""
    try:
        result(training)
    except ValueError as error:
        return str(error)
    return None


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
