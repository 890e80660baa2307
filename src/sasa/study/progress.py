"""How far a study is: a line for each training that ended, and on a terminal a bar with what runs."""

from __future__ import annotations

import threading
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

BAR_WIDTH = 24


class Board:
    """Tells how far one stage of a study is; its methods may be called from several threads.

    Args:
        stage: what to call the trainings.
        total: all of the stage.
        done: those that were finished before.
        slots: trainings that run at once.
    """

    def __init__(self, stage: str, total: int, done: int, slots: int) -> None:
        self.stage, self.total, self.ended, self.slots = stage, total, done, slots
        self.console = Console(stderr=True)
        self._left = total - done
        self._seconds: list[float] = []
        self._running: list[str] = []
        self._lock = threading.Lock()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(BAR_WIDTH),
            TextColumn("{task.completed} of {task.total}{task.fields[tail]}", markup=False),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task(stage, total=total, completed=done, tail="")

    def __enter__(self) -> Board:
        if self.ended:
            self.say(f"{self.stage}: {self.ended} of {self.total} finished before")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, line: str, style: str = "") -> None:
        """Print a line above the bar."""
        tell(line, style, self.console)

    def began(self, key: str) -> None:
        """A training runs."""
        with self._lock:
            self._running.append(key)
            self._show()

    def finished(self, key: str, result: str, seconds: float) -> None:
        """A training came to a result."""
        with self._lock:
            self._seconds.append(seconds)
            self._end(key)
            self.say(f"{self.stage}: {self.ended} of {self.total}{self._eta()}: {key}: {result} in {seconds:.0f} s")

    def failed(self, key: str, reason: str) -> None:
        """A training came to none."""
        with self._lock:
            self._end(key)
            self.say(f"{self.stage}: {self.ended} of {self.total}{self._eta()}: {key} failed: {reason}", "red")

    def _end(self, key: str) -> None:
        self._running.remove(key)
        self.ended += 1
        self._left -= 1
        self._show()

    def _show(self) -> None:
        tail = self._eta() + (f": {', '.join(self._running)}" if self._running else "")
        room = self.console.width - len(f"{self.stage}  {self.ended} of {self.total} ") - BAR_WIDTH - 1
        self._bar.update(self._task, completed=self.ended, tail=tail if len(tail) <= room else f"{tail[: room - 1]}…")

    def _eta(self) -> str:
        """The time left, should the others take as long as those so far."""
        if not self._seconds or not self._left:
            return ""
        seconds = sum(self._seconds) / len(self._seconds) * self._left / min(self.slots, self._left)
        return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"


def tell(line: str, style: str = "", console: Console | None = None) -> None:
    """Print a line to the error stream."""
    (console or Console(stderr=True)).print(Text(line, style), soft_wrap=True)
