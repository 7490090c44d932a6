"""What is registered: each objective function with its range, its options and one score that was really computed."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic.dataclasses import is_pydantic_dataclass

from emorl.objectives import REGISTRY, registered
from emorl.objectives.scale import declared_range

EXAMPLE_PROMPT = "I am tired all day and I sleep badly."
EXAMPLE_COMPLETION = "You sleep badly and you sleep badly every night."


@dataclass(frozen=True)
class Entry:
    """A registered objective function.

    `scores` says what it scores, `needs` names the options it cannot do without, `example` is the raw score of
    `EXAMPLE_COMPLETION` by the function with its default options; None where it needs something.
    """

    name: str
    scores: str
    range: tuple[float, float] | None
    options: Mapping[str, Any]
    needs: tuple[str, ...]
    example: float | None


def catalogue() -> list[Entry]:
    """All registered objective functions, in the registry's order; loads no model."""
    return [_entry(name, registered(name)) for name in REGISTRY]


def _entry(name: str, function: Any) -> Entry:
    parameters = {
        option: parameter.default
        for option, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    needs = tuple(option for option, default in parameters.items() if default is inspect.Parameter.empty)
    options = {option: _value(function, option, default) for option, default in parameters.items() if option not in needs}
    scores = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
    example = None if needs else function()(prompts=[EXAMPLE_PROMPT], completions=[EXAMPLE_COMPLETION])[0]
    return Entry(name, scores, declared_range(function), options, needs, example)


def _value(function: Any, option: str, default: Any) -> Any:
    """The default of an option; a signature shows one that is made anew for each object as a placeholder."""
    if is_pydantic_dataclass(function):
        return function.__pydantic_fields__[option].get_default(call_default_factory=True)
    return default
