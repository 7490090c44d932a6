"""What the page of `emorl serve` shows of a run, read from its directory, and which objectives may score there for everybody.

An objective scores an answer to any prompt where that costs neither money nor long waiting: rules do, and models on this disk
with little to load. A judge does not, nor code in a sandbox, nor what compares with a column of the data. A function of the
user's does: the run has called it for thousands of answers; but not an `async` one, which waits for another machine.
"""

import inspect
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emorl.config import UserError
from emorl.config.experiment import Experiment, load_kept_experiment
from emorl.config.objective import ObjectiveConfig
from emorl.runs.layout import COMPLETIONS, POLICY, Layout
from emorl.runs.results import Point, SearchResult, best_dynamic_ensemble, read_result
from emorl.stages.generate import told_front
from emorl.stages.materials import Materials

if TYPE_CHECKING:
    import pandas as pd
    from starlette.routing import BaseRoute

    from emorl.serving.page import Histogram, PageFacts
    from emorl.serving.preparing import Preparing

_MOST_MEGABYTES = 200
_PROMPTS, _BINS = 8, 50
_MIXED = ["best", "front", "weights"]
"""kinds of models that weights make"""
_HANDED = {"prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra"}
"""what every reward function gets, beside the data's columns"""


def page_of(directory: Path, preparing: "Preparing") -> "Sequence[BaseRoute]":
    """The page's routes.

    Args:
        directory: as `emorl serve` takes it.
        preparing: how it reads requests.
    """
    from emorl.serving.page import page_routes
    from emorl.serving.scores import AnswerScores

    facts = page_facts(directory, preparing)
    load = Materials(load_kept_experiment(directory)).objective if facts.scored else None
    return page_routes(facts, AnswerScores({name: partial(load, name) for name in facts.scored if load}, facts.chat))


def page_facts(directory: Path, preparing: "Preparing") -> "PageFacts":
    """The facts of a run; of a policy in a folder, only how it is asked and what it is told.

    Raises:
        UserError: a table of the run is damaged.
    """
    from emorl.policies.prompts import is_chat
    from emorl.serving.page import PageFacts

    layout, chat = Layout(directory), is_chat(preparing.tokenizer)
    experiment = load_kept_experiment(directory) if layout.experiment.is_file() else None
    objectives = {} if experiment is None else experiment.objectives
    front, best = _points(directory)
    answered = _answered(layout, list(objectives))
    reasons = {name: why_not_scored(name, config) for name, config in objectives.items()}
    return PageFacts(
        output=str(directory),
        chat=chat,
        objectives=list(objectives) or (list(front[0].scores) if front else []),
        policies=list(front[0].weights) if front else [],
        front=front,
        best=best,
        generation=preparing.defaults.generation,
        system_prompt=preparing.defaults.system_prompt,
        commands=_commands(directory),
        scored=[name for name, reason in reasons.items() if reason is None],
        not_scored={name: reason for name, reason in reasons.items() if reason is not None},
        scores={} if answered is None else histograms(answered, list(objectives)),
        prompts=[] if experiment is None else _prompts(experiment, answered, chat),
    )


def _points(directory: Path) -> tuple[list[Point], int | None]:
    """The search's front in order of falling value, else that of an adapter which was distilled for all of it, with the index
    of the best."""
    layout = Layout(directory)
    if layout.has_result("search"):
        search = read_result(SearchResult, layout.search)
        best, front = search.best, search.front
    elif (told := told_front(directory) or told_front(layout.distillation / POLICY)) is not None:
        best, front = told
    else:
        return [], None
    ordered = sorted(front, key=lambda point: -point.value)
    return ordered, next((index for index, point in enumerate(ordered) if point.weights == best.weights), 0)


def _commands(directory: Path) -> dict[str, tuple[str, str]]:
    """Kind of model -> the command that answers as it does, before and behind its settings."""
    layout = Layout(directory)

    def of(place: Path, *options: str) -> tuple[str, str]:
        return f"emorl generate {shlex.quote(str(place))}", " ".join(options)

    def of_policy(place: Path) -> tuple[str, str]:
        return of(place, *(["--weights"] if told_front(place) else []))

    if not layout.experiment.is_file():
        return dict.fromkeys([*_MIXED, "policy", "dynamic"], of_policy(directory))
    distilled = layout.distillation / POLICY
    commands: dict[str, tuple[str, str]] = {}
    if layout.has_result("search"):
        ensemble = ["--ensemble"] if told_front(distilled) else []
        commands = dict.fromkeys([*_MIXED, "policy"], of(directory, *ensemble, "--weights"))
    elif told_front(distilled):
        commands = dict.fromkeys(_MIXED, of_policy(distilled))
    if (dynamic := best_dynamic_ensemble(layout)) is not None:
        commands["dynamic"] = of(dynamic)
    return {**commands, "distilled": of_policy(distilled), "fused": of(layout.fusion / POLICY)}


def _answered(layout: Layout, objectives: Sequence[str]) -> "pd.DataFrame | None":
    """Scored answers to the test prompts: the evaluation's, else those that a distillation compared."""
    import pandas as pd

    from emorl.evaluation.tables import read_table

    evaluated = layout.evaluation / COMPLETIONS
    files = [evaluated] if evaluated.is_file() else sorted((layout.distillation / "systems").glob("*.parquet"))
    columns = ["prompt_index", "prompt", *objectives]
    tables = [read_table(file, columns, f"remove {file} and run its stage again")[columns] for file in files]
    return pd.concat(tables, ignore_index=True) if tables else None


def histograms(answered: "pd.DataFrame", objectives: Sequence[str]) -> dict[str, "Histogram"]:
    """Of each objective's scores that are numbers, over [0, 1] or what they cover beyond it."""
    import numpy as np

    from emorl.serving.page import Histogram

    found = {}
    for name in objectives:
        scores = answered[name].dropna().to_numpy(float)
        if len(scores):
            counts, edges = np.histogram(scores, _BINS, (min(0.0, scores.min()), max(1.0, scores.max())))
            found[name] = Histogram(float(edges[0]), float(edges[-1]), counts.tolist())
    return found


def _prompts(experiment: Experiment, answered: "pd.DataFrame | None", chat: bool) -> list[str]:
    """A few test prompts."""
    from emorl.policies.conversation import prompt_text

    if answered is not None:
        return answered.drop_duplicates("prompt_index")["prompt"].head(_PROMPTS).tolist()
    try:
        test = Materials(experiment).splits_as(chat).test
    except UserError:  # the data may have gone since
        return []
    return [prompt_text(prompt) for prompt in test["prompt"][:_PROMPTS]]


def why_not_scored(name: str, config: ObjectiveConfig) -> str | None:
    """Why an objective does not score answers to any prompt, as the end of a sentence; None for one that does."""
    from emorl.objectives import REGISTRY
    from emorl.objectives.loading import function_of

    if config.function is None:
        return "it has pairs and no function that scores"
    place = REGISTRY.get(config.function, config.function) if isinstance(config.function, str) else ""
    if place.startswith("emorl.objectives.judge"):
        return "a judge is asked for each answer, which may cost money"
    if place.startswith("emorl.objectives.code"):
        return "it runs the answer's code"
    try:
        function, options = function_of(name, config)
    except UserError as error:
        return str(error)
    is_function = inspect.isroutine(function) or isinstance(function, partial)
    if inspect.iscoroutinefunction(function if is_function else function.__call__):
        return "it waits for another machine"
    if column := _column(function, options):
        return f"it compares with the data's column {column!r}, which a free prompt does not have"
    return _too_large(options)


def _column(function: Any, options: Mapping[str, Any]) -> str | None:
    """A column of the data that the function cannot do without: named by an option, or an argument of its call."""
    if isinstance(function, type):
        parameters = inspect.signature(function).parameters
        for name, parameter in parameters.items():
            if name.endswith("_column") and (value := options.get(name, parameter.default)) is not None:
                return str(value)
        function = function.__call__
    for name, parameter in inspect.signature(function).parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and name not in {*_HANDED, "self", *options}:
            return name
    return None


def _too_large(options: Mapping[str, Any]) -> str | None:
    """Why the models and files that options name are not loaded here."""
    from huggingface_hub import try_to_load_from_cache

    model = options.get("model")
    if not isinstance(model, str):
        return None
    folder = Path(model).expanduser()
    if not folder.is_dir():
        config = try_to_load_from_cache(model, "config.json")
        if not isinstance(config, str):
            return f"its model {model} is not on this disk"
        folder = Path(config).parent
    megabytes = sum(file.stat().st_size for file in folder.glob("*.safetensors*")) / 1e6
    return f"its model of {megabytes:,.0f} MB is too large" if megabytes > _MOST_MEGABYTES else None
