"""From a config to a checked objective: names and options before any model loads, scores whenever it is called."""

import asyncio
import functools
import importlib
import inspect
import math
import numbers
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic.dataclasses import is_pydantic_dataclass

from emorl.config import UserError, nearest
from emorl.config.objective import ObjectiveConfig, TransformConfig
from emorl.config.objects import shown_name
from emorl.config.yaml import parse
from emorl.objectives import REGISTRY
from emorl.objectives.calling import Tokenize, faults_of, handed_by_trl
from emorl.objectives.scale import RAW, Scale, declared_range, interval, resolve

_IMPORTABLE = re.compile(r"[\w-]+(\.[\w-]+)*:[^\W\d]\w*(\.[^\W\d]\w*)*")  # package.module:attribute


class Objective:
    """A reward function under its name and on its scale; called, it gives scores, which only training turns into rewards.

    Every call's scores are checked (one finite number or None per completion), and those outside the range are counted.

    Raises:
        UserError: on a call, when the function returns the wrong number of scores, NaN, infinity or no number.
    """

    def __init__(self, name: str, function: Callable[..., Any], scale: Scale = RAW, tokenize: Tokenize | None = None) -> None:
        """`tokenize` makes `completion_ids` for a function that asks for them where nobody knows them."""
        self.name = self.__name__ = name  # TRL logs a reward function under its __name__
        self.scale = scale
        self.scored = self.outside = 0  # scores so far, and how many of them lay outside the range
        self._function = function
        self._tokenize = tokenize

    def counted_anew(self) -> "Objective":
        """The same objective, whose counts begin at 0."""
        return Objective(self.name, self._function, self.scale, self._tokenize)

    @property
    def batch_tolerance(self) -> float:
        """How far a score may move with the batch it is computed in, as the function declares."""
        return getattr(self._function, "batch_tolerance", 1e-4)

    @property
    def key(self) -> str:
        """What remembered scores are filed under: those of another scale are other scores."""
        return self.name if self.scale == RAW else f"{self.name} {self.scale!r}"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        raw = self.raw(prompts, completions, **columns)
        self.scored += len(raw)
        self.outside += sum(score is not None and self.scale.is_outside(score) for score in raw)
        return [None if score is None else self.scale.score(score) for score in raw]

    def raw(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """What the function itself returns, checked."""
        handed = handed_by_trl(self._function, completions, columns, self._tokenize)
        try:
            scores = self._function(prompts=list(prompts), completions=list(completions), **columns, **handed)
            if inspect.isawaitable(scores):
                scores = _run(_awaited(scores))
            scores = list(scores) if inspect.isgenerator(scores) else scores
        except (Exception, SystemExit) as error:  # whatever a user's function raises
            if (line := faults_of(f"objective {self.name!r}", error)) is None:
                raise
            raise line from error
        return self._checked(scores, len(completions))

    def rewards(self, scores: Sequence[float | None]) -> list[float | None]:
        """Scores as training maximises them."""
        return [None if score is None else self.scale.reward(score) for score in scores]

    def _checked(self, scores: Any, expected: int) -> list[float | None]:
        where = f"objective {self.name!r}"
        if isinstance(scores, str | Mapping) or not hasattr(scores, "__iter__"):
            raise UserError(f"{where} returned {scores!r:.60}; expected a list with one score per completion")
        scores = [
            score.item() if getattr(score, "size", None) == 1 or getattr(score, "ndim", None) == 0 else score
            for score in scores
        ]
        if len(scores) != expected:
            raise UserError(f"{where} returned {len(scores)} scores for {expected} completions; expected one for each")
        for position, score in enumerate(scores):
            if score is None:
                continue
            if not isinstance(score, numbers.Real) or not math.isfinite(score):
                raise UserError(
                    f"{where} returned {score!r:.60} for completion {position}; expected a finite number, or None where "
                    "a completion cannot be scored"
                )
        return [None if score is None else float(score) for score in scores]


async def _awaited(scores: Any) -> Any:
    return await scores


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The coroutine's result; in a thread of its own where this one runs an event loop, as a notebook's does."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


def check_objectives(objectives: Mapping[str, ObjectiveConfig]) -> None:
    """Resolves every objective's function and options without loading a model: nothing is imported before all names are
    right, and no option is looked at before all functions are there.

    Raises:
        UserError: an unknown name (with the nearest ones), a local model folder that does not exist, a module or attribute
            that is not there, an unknown or missing option.
    """
    named = {name: _named(name, config) for name, config in objectives.items()}
    functions = {name: _imported(name, function) for name, (function, _) in named.items()}
    for name, (_, options) in named.items():
        _checked_scale(name, functions[name], options, objectives[name].transform)


def outside_range(objectives: Sequence[Objective]) -> list[str]:
    """One line for each objective that has scored outside its range: how many scores were clipped."""
    return [
        f"objective {objective.name!r}: {objective.outside:,} of {objective.scored:,} raw scores were outside its range "
        f"{interval(objective.scale.range)} and were clipped; a wider `transform.range` would tell them apart"
        for objective in objectives
        if objective.outside
    ]


def load_objective(name: str, config: ObjectiveConfig, tokenize: Tokenize | None = None) -> Objective:
    """The objective ready to score; loads its model if it has one. `tokenize` is as `Objective`'s."""
    function, options = function_of(name, config)
    scale = _checked_scale(name, function, options, config.transform)
    if isinstance(function, type) and is_pydantic_dataclass(function):
        made: Any = parse(function, options, f"objective {name!r}")
        return Objective(name, made, scale, tokenize)
    try:
        made = function(**options) if isinstance(function, type) else _partial(function, options)
        return Objective(name, made, scale, tokenize)
    except (ValueError, OSError) as error:
        what = f"model {options['model']!r}: " if isinstance(error, OSError) and "model" in options else ""
        raise UserError(f"objective {name!r}: {what}{str(error).splitlines()[0]:.300}") from None


def function_of(name: str, config: ObjectiveConfig) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The class or function of an objective, imported and not called, and its options."""
    named, options = _named(name, config)
    return _imported(name, named), options


def _partial(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    return functools.partial(function, **options) if options else function


def _named(name: str, config: ObjectiveConfig) -> tuple[str | Callable[..., Any], dict[str, Any]]:
    """The function's key in the registry, its `module:attribute` or itself, and its options: what can be said of them
    without an import is checked."""
    where, function, options = f"objective {name!r}", config.function, dict(config.options)
    if function is None:
        raise UserError(
            f"{where} has pairs, and no function that scores answers; train one of the same pairs with `emorl train-reward`, "
            "then give the objective {function: classifier, model: OUTPUT/model} beside its pairs"
        )
    if isinstance(function, str) and ":" in function:
        if not _IMPORTABLE.fullmatch(function):
            lost = "; a lambda, closure, method or instance has to be given in Python again" if function[0] == "<" else ""
            raise UserError(f"{where}: expected package.module:attribute, got {function!r:.80}{lost}")
    elif isinstance(function, str) and function not in REGISTRY:
        if "/" not in function:
            raise UserError(
                f"{where}: no objective function is called {function!r}; {nearest(function, REGISTRY)} "
                "(or a hub id, or package.module:attribute)"
            )
        function, options = "classifier", {"model": function, **options}
    model = None if options.get("endpoint") else options.get("model")  # an endpoint's model may be a path over there
    if isinstance(model, str):
        _check_place(where, model)
    return function, options


def _check_place(where: str, model: str) -> None:
    """Refuses a folder that is not there, or holds no model; a name with one slash beside no such folder is a hub id."""
    folder = Path(model).expanduser()
    is_path = model.startswith((".", "/", "~")) or model.count("/") > 1 or (model.count("/") == 1 and folder.parent.is_dir())
    if is_path and not folder.is_dir():
        raise UserError(f"{where}: model {model!r} is not a folder")
    if folder.is_dir() and not any((folder / file).is_file() for file in ("config.json", "modules.json")):
        raise UserError(f"{where}: folder {model!r} holds no model (no config.json in it)")


def _imported(name: str, named: str | Callable[..., Any]) -> Callable[..., Any]:
    """The class or function behind what `_named` gives."""
    if not isinstance(named, str):
        return named
    where, (module_name, _, path) = f"objective {name!r}", REGISTRY.get(named, named).partition(":")
    try:
        value: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{where}: cannot import {module_name!r} ({error}); is it on PYTHONPATH?") from None
    except (Exception, SystemExit) as error:  # whatever a user's module does
        if isinstance(error, SyntaxError):
            raise UserError(f"{where}: {error.filename}:{error.lineno} is no Python ({error.msg})") from error
        if (line := faults_of(f"{where}: importing {module_name}", error)) is None:
            raise
        raise line from error
    for attribute in path.split("."):
        owner, value = value, getattr(value, attribute, None)
        if value is None:
            raise UserError(f"{where}: {module_name} has no {path!r}; {nearest(attribute, dir(owner))}")
    if not callable(value):
        raise UserError(f"{where}: {named} is {value!r:.60}; expected a function or class")
    return value


def _checked_scale(
    name: str, function: Callable[..., Any], options: Mapping[str, Any], transform: TransformConfig | None
) -> Scale:
    """The scale of a function whose options are right."""
    where = f"objective {name!r}"
    _check_options(where, function, options)
    if isinstance(function, type) and is_pydantic_dataclass(function):  # is its settings: nothing loads before a call
        parse(function, options, where)
    try:
        return resolve(transform, declared_range(function))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _check_options(where: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        raise UserError(f"{where}: {shown_name(function)} has no signature to read; wrap it in a function") from None
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for option in options:
            if option not in parameters:
                raise UserError(f"{where}: unknown option {option!r}; {nearest(option, parameters)}")
    if not isinstance(function, type):
        try:
            inspect.signature(function).bind_partial(prompts=[], completions=[])
        except TypeError:
            raise UserError(
                f"{where}: {shown_name(function)} cannot be given prompts and completions by name; end its arguments with "
                "**columns, as TRL's reward functions do"
            ) from None
    if isinstance(function, type):
        for option, parameter in parameters.items():
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if named and parameter.default is parameter.empty and option not in options:
                raise UserError(f"{where}: option {option!r} is missing")
