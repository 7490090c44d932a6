"""Progress on the terminal, by rich; on standard error, so that results can be piped."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from emorl.runs.progress import Bar

_NOTE_SECONDS = 15.0


class _Remaining(ProgressColumn):
    """How long it takes at the mean pace so far: this bar, and all that follow."""

    def render(self, task: Task) -> Text:
        return Text(_remaining(task), style="progress.remaining")


def _remaining(task: Task) -> str:
    steps = task.completed - task.fields["done"]
    if not steps or task.elapsed is None or task.total is None:
        return ""
    pace, following = task.elapsed / steps, task.fields["following"]
    here = f"{_spoken(pace * (task.total - task.completed))} left"
    if not following:
        return here
    return f"{here} ({_spoken(pace * (task.total - task.completed + following * task.total))} for all)"


def _spoken(seconds: float) -> str:
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.{1 if seconds < 10 * unit and unit == 3600 else 0}f} {name}"
    return f"{seconds:.0f} s"


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
            figures = "  ".join(filter(None, (f"{task.completed:.0f}/{task.total:.0f}", _remaining(task), note)))
            console.print(f"  {task.description}: {figures}", highlight=False)


class Console:
    """The command line's `emorl.runs.progress.Progress`."""

    def __init__(self) -> None:
        self._console = rich.console.Console(stderr=True, soft_wrap=True)

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False)

    def warn(self, line: str) -> None:
        self._console.print(f"warning: {line}", style="bold red", highlight=False, markup=False)

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0, following: int = 0) -> Iterator[Bar]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _Remaining(),
            TextColumn("{task.fields[note]}"),
        )
        with RichProgress(*columns, console=self._console, disable=not self._console.is_terminal) as progress:
            fields = {"note": "", "done": done, "following": following}
            yield _RichBar(progress, progress.add_task(title, total=total, completed=done, **fields))
