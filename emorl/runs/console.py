"""Progress on the terminal, by rich; on standard error, so that results can be piped."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from emorl.runs.progress import Bar

_NOTE_SECONDS = 15.0


class _RichBar:
    """A bar on a terminal; a line now and then where the output is a file."""

    def __init__(self, progress: RichProgress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._last_line = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._progress.update(self._task, advance=steps, note=note)
        console = self._progress.console
        if not console.is_terminal and time.monotonic() - self._last_line > _NOTE_SECONDS:
            self._last_line = time.monotonic()
            task = next(task for task in self._progress.tasks if task.id == self._task)
            console.print(f"  {task.description}: {task.completed:.0f}/{task.total:.0f}  {note}", highlight=False)


class Console:
    """The command line's `emorl.runs.progress.Progress`."""

    def __init__(self) -> None:
        self._console = rich.console.Console(stderr=True, soft_wrap=True)

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False)

    def warn(self, line: str) -> None:
        self._console.print(f"warning: {line}", style="bold red", highlight=False, markup=False)

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Iterator[Bar]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with RichProgress(*columns, console=self._console, disable=not self._console.is_terminal) as progress:
            yield _RichBar(progress, progress.add_task(title, total=total, completed=done, note=""))
