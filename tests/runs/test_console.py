import io
import time

import pytest
import rich.console

from emorl.runs import console
from emorl.runs.console import Console


@pytest.fixture
def drawn(monkeypatch):
    """A console that writes into memory, whose clock the test moves, and who says a line at every step."""
    clock, made = {"now": 0.0}, Console()
    made._console = rich.console.Console(file=io.StringIO(), width=200, get_time=lambda: clock["now"])
    monkeypatch.setattr(console, "_NOTE_SECONDS", -1.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    return made, clock, made._console.file


def test_the_first_step_already_tells_how_long_it_takes(drawn):
    made, clock, shown = drawn
    with made.bar("train kind (1 of 3)", 10, following=2) as bar:
        clock["now"] = 60.0
        bar.advance(1, "reward 0.5")
    assert shown.getvalue() == "  train kind (1 of 3): 1/10  9 min left (29 min for all)  reward 0.5\n"


def test_what_was_done_before_is_no_part_of_the_pace(drawn):
    made, clock, shown = drawn
    with made.bar("search", 10, done=8) as bar:
        clock["now"] = 4.0
        bar.advance(1)
    assert shown.getvalue() == "  search: 9/10  4 s left\n"
