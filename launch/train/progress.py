"""How far a run is: a bar on a terminal, a line now and then elsewhere (as under horovodrun, which prefixes lines)."""

import sys
from types import TracebackType
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINES = 10
_BAR_WIDTH = 20


class Reporter(Protocol):
    """Something that shows steps as they are done; used as a context manager."""

    def __enter__(self) -> "Reporter": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, done: int, loss: float) -> None:
        """`done` steps are done, the last with this training loss."""


def reporter(title: str, total: int, start: int, visible: bool) -> Reporter:
    """A bar if standard output is a terminal, lines if not, nothing on the ranks that are not to print."""
    if not visible:
        return Silence()
    return Bar(title, total, start) if sys.stdout.isatty() else Lines(title, total)


class Silence:
    """Shows nothing."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, done: int, loss: float) -> None:
        """Shows nothing."""


class Lines(Silence):
    """One line per tenth of the run."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total = title, total
        self._every = max(1, total // _LINES)

    def show(self, done: int, loss: float) -> None:
        """Print a line if another tenth is done."""
        if done % self._every == 0 or done == self._total:
            filled = _BAR_WIDTH * done // self._total
            bar = "#" * filled + "." * (_BAR_WIDTH - filled)
            print(f"{self._title} [{bar}] step {done}/{self._total}, training loss {loss:.4f}", flush=True)


class Bar(Silence):
    """A bar that moves with every step."""

    def __init__(self, title: str, total: int, start: int = 0) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("training loss {task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task(title, total=total, completed=start, loss="-")

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, done: int, loss: float) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=done, loss=f"{loss:.4f}")
