"""Trainings as processes of their own: where each runs, and how they are stopped."""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from ..train import OutputError
from ..train.callbacks import SIGNALS

COMMAND = [sys.executable, "-m", "sasa", "train"]

STOPPING = (signal.SIGINT, signal.SIGHUP, *SIGNALS)

# What a launcher tells the processes of one training; here each training is one process.
_LAUNCHERS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_LAUNCHERS_PREFIXES = ("SLURM_", "TORCHELASTIC_")


class Interrupted(Exception):  # noqa: N818
    """A signal asked to stop, and the training was stopped or not begun."""


@dataclass(frozen=True)
class Slots:
    """Where trainings run at once.

    Attributes:
        gpus: the GPU of each, as CUDA_VISIBLE_DEVICES names it; None for the CPU.
        threads: of each.
    """

    gpus: tuple[str | None, ...]
    threads: int


def find_slots(parallel: int, on_cpu: bool) -> Slots:
    """The GPUs at hand, each ``parallel`` times; without any, or ``on_cpu``, the CPU that often."""
    count = 0 if on_cpu else torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",")] if visible else [str(index) for index in range(count)]
    gpus = tuple(names[:count]) * parallel if count else (None,) * parallel
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Slots(gpus, int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // len(gpus))))


class Processes:
    """Runs trainings, and stops them when a signal asks to.

    Args:
        slots: where they run.
    """

    def __init__(self, slots: Slots) -> None:
        self.signalled: signal.Signals | None = None
        self._threads = slots.threads
        self._running: set[subprocess.Popen] = set()
        self._free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for gpu in slots.gpus:
            self._free.put(gpu)

    def run(self, arguments: list[str], log: Path, began: Callable[[int], None]) -> int:
        """The exit status of a training with ``arguments``, which prints to ``log``; ``began`` is given its number.

        Raises:
            Interrupted: it was stopped, or not begun.
        """
        gpu = self._free.get()
        try:
            with log.open("ab") as file:
                # The training inherits the lock with the file, and holds it as long as it runs, with this process or
                # without it: no two ever train into one folder.
                while not _locked(file):
                    self.check()
                    time.sleep(0.1)
                self.check()
                # In a group of its own: Ctrl-C is for this process, which passes it on.
                process = subprocess.Popen(  # noqa: S603
                    [*COMMAND, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=self._environment(gpu),
                    process_group=0,
                )
            self._running.add(process)
            try:
                if self.signalled:  # between the check and now
                    process.terminate()
                began(process.pid)
                status = process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
            finally:
                self._running.discard(process)
            if status and self.signalled:
                raise Interrupted
            return status
        finally:
            self._free.put(gpu)

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal has asked to stop."""
        if self.signalled:
            raise Interrupted

    def end_left_over(self, found: dict[Path, int | None], say: Callable[[str], None]) -> None:
        """Let trainings that a killed scheduler has left behind save and end: by their logs, the processes."""
        with contextlib.ExitStack() as stack:
            logs = {log: stack.enter_context(log.open("ab")) for log in found if log.exists()}
            running = {log: file for log, file in logs.items() if not _locked(file)}
            for log in running:
                say(f"{log.stem} still runs, left by a scheduler that was killed: it is told to save and end")
                process = found[log]
                with contextlib.suppress(ProcessLookupError):
                    # Only a process that leads a group, as trainings do, can be the one.
                    if process is not None and os.getpgid(process) == process:
                        os.kill(process, signal.SIGTERM)
            for file in running.values():
                while not _locked(file):
                    self.check()
                    time.sleep(0.1)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within, a signal that asks to stop goes to the trainings, which save; a second one ends them at once."""
        before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
                    before[number] = signal.signal(number, self._stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _stop(self, number: int, frame: Any) -> None:
        again, self.signalled = self.signalled is not None, signal.Signals(number)
        running = list(self._running)
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                if again:
                    os.killpg(process.pid, signal.SIGKILL)
                else:  # to the training alone: its workers' deaths would look like a failure to it
                    process.terminate()
        if running and not again:
            # Not through rich, whose locks the interrupted code may hold.
            os.write(2, f"\n{self.signalled.name}: waiting for what runs to save; again ends it at once\n".encode())

    def _environment(self, gpu: str | None) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHERS}
        kept = {name: value for name, value in kept.items() if not name.startswith(_LAUNCHERS_PREFIXES)}
        kept["OMP_NUM_THREADS"] = str(self._threads)
        return kept if gpu is None else kept | {"CUDA_VISIBLE_DEVICES": gpu}


def _locked(file: IO[bytes]) -> bool:
    """Lock a file if nobody else has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Within, no other scheduler works in the folder. The lock vanishes with the process, however it ends.

    Raises:
        OutputError: another one does.
    """
    with (out / "lock").open("a+b") as file:
        if not _locked(file):
            file.seek(0)
            holder = file.read().decode(errors="replace").strip()
            raise OutputError(f"out: expected no other study at work in {out}, got process {holder}'s")
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
        file.flush()
        yield
