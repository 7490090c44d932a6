"""Calls a user's reward function as TRL calls it, and says in one line what goes wrong in it."""

import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from emorl.config import UserError
from emorl.policies.conversation import completion_text
from emorl.runs.faults import library_of


@dataclass
class NoTrainer:
    """What a reward function that looks at its trainer sees where none is at work; names are transformers' `TrainerState`'s."""

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    log_history: list[dict[str, float]] = field(default_factory=list)


Tokenize = Callable[[Sequence[str]], list[list[int]]]


def handed_by_trl(
    function: Callable[..., Any], completions: Sequence[Any], given: Mapping[str, Any], tokenize: Tokenize | None
) -> dict[str, Any]:
    """What TRL's trainers hand to reward functions beside the data's columns: of that what this function names and is not
    given. `completion_ids` are the texts' tokens, `trainer_state` is empty, `log_metric` and `log_extra` log nothing."""
    named = set(inspect.signature(function).parameters) - set(given)
    offered: dict[str, Callable[[], Any]] = {
        "trainer_state": NoTrainer,
        "log_metric": lambda: _log_nothing,
        "log_extra": lambda: _log_nothing,
    }
    if tokenize is not None:
        offered["completion_ids"] = lambda: tokenize([completion_text(completion) for completion in completions])
    return {name: make() for name, make in offered.items() if name in named}


def _log_nothing(*arguments: Any, **options: Any) -> None:
    """TRL's loggers belong to a trainer."""


def faults_of(where: str, error: BaseException) -> UserError | None:
    """A line on what a function of the user's raised, with its place; None where our own code raised it."""
    if isinstance(error, SystemExit):
        return UserError(f"{where} ended the program (sys.exit); a reward function returns scores, or raises an exception")
    if isinstance(error, UserError) or library_of(error.__traceback__, ours=("emorl",)) is None:
        return None
    return UserError(f"{where} raised {type(error).__name__}{_at(error.__traceback__)}: {' '.join(str(error).split()):.200}")


def _at(trace: TracebackType | None) -> str:
    """The innermost line outside our code and the libraries it calls, as ` at rewards.py:12`."""
    frames = [
        frame
        for frame in traceback.extract_tb(trace)
        if "/emorl/" not in frame.filename and "site-packages" not in frame.filename
    ]
    return f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
