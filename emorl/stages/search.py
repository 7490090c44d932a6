"""Search stage: finds aggregation weights on the validation prompts (`emorl search experiment.yaml`).

Every candidate faces the same prompts, and the same random numbers where decoding samples. The search's best score is a maximum
over noisy estimates: it is stored as such, and what is chosen is scored again on the test prompts by `emorl evaluate`. Its run
directory holds `trials.csv` (every candidate with its scores and standard errors), `result.json` (the best candidate, and the
front over all objectives) and `ensemble/`, which `HiddenStateEnsemble.from_pretrained` loads.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emorl.config import UserError
from emorl.config.experiment import Experiment
from emorl.runs.console import Console
from emorl.runs.layout import ENSEMBLE, JOURNAL, SCORES, TRIALS, Layout
from emorl.runs.progress import Progress
from emorl.runs.results import Point, SearchResult, as_json, read_result
from emorl.runs.run import Run, only_process, written_whole
from emorl.stages.materials import Materials
from emorl.stages.options import add_experiment, load
from emorl.stages.stage import Stage, perform
from emorl.stages.train import TRAINING

if TYPE_CHECKING:
    import pandas as pd

    from emorl.evaluation.memo import ScoreMemo
    from emorl.objectives.scalarize import Value
    from emorl.search.spaces.weight_space import WeightSpace
    from emorl.search.weight_evaluation import WeightEvaluator

STUDY_NAME = "weights"


def check(experiment: Experiment) -> None:
    """Refuses an unknown proposer, objective or generation setting, and an experiment that has nothing to search."""
    check_mode(experiment)
    from emorl.search.storage import check_storage
    from emorl.search.weights import check_proposer

    check_proposer(experiment.search)
    if experiment.search.storage is not None:
        check_storage(experiment.search.storage)
    from emorl.objectives.loading import check_objectives

    check_objectives(experiment.objectives)
    from emorl.policies.generation import check_generation

    check_generation(generation_of(experiment))


def check_mode(experiment: Experiment) -> None:
    """Refuses an experiment that trains one policy."""
    if experiment.train.mode != "ensemble":
        raise UserError(
            f"train.mode={experiment.train.mode} trains one policy, which has no weights to search: use `emorl train`; "
            "`emorl compare` sets it beside the ensemble"
        )


def generation_of(experiment: Experiment) -> dict[str, Any]:
    """How candidates of a search decode."""
    return {**experiment.generation, **experiment.search.generation}


def is_enough(experiment: Experiment, result: SearchResult) -> bool:
    """Whether no larger budget is left."""
    if result.ended_by_budget is None:
        return True
    from emorl.search.weights import budget_of

    return result.ended_by_budget == asdict(budget_of(experiment.search))


def work(materials: Materials, run: Run, progress: Progress) -> SearchResult:
    """Searches on behind what the study holds."""
    from emorl.aggregation.ensemble import BASE_POLICY
    from emorl.evaluation.memo import ScoreMemo
    from emorl.objectives.loading import outside_range
    from emorl.objectives.scalarize import Value
    from emorl.search.spaces.weight_space import WeightSpace
    from emorl.search.study import open_study
    from emorl.search.trials import search_on, total_cost, valuation
    from emorl.search.weights import budget_of, chosen_proposer, silence_optuna, weight_proposer

    silence_optuna()
    experiment = materials.experiment
    config, objectives, policies = experiment.search, list(experiment.objectives), experiment.policy_names
    materials.layout.trained(policies)
    space = WeightSpace((*policies, *([BASE_POLICY] if experiment.ensemble.include_base else [])))
    value, budget = Value.of(experiment.value, objectives), budget_of(config)
    of_trials = valuation(value, space.corners()[: len(space.policies)])
    proposer, expected = weight_proposer(config, space, of_trials, len(objectives), experiment.seed)
    progress.say(f"search: {chosen_proposer(config)} over the weights of {', '.join(space.policies)}")
    study = open_study(_storage(experiment), objectives, _study_name(experiment), run.config)
    with ScoreMemo(run.path / SCORES) as memo:
        evaluator = _evaluator(materials, space, value, memo)
        finished = search_on(
            study, proposer, evaluator, space, of_trials,
            title="weights", expected=expected, progress=progress, batch=config.batch, budget=budget,
        )  # fmt: skip
    progress.say(f"search: {evaluator.describe_work()}")
    for line in outside_range(evaluator.objectives):
        progress.warn(line)
    is_spent = budget.is_spent(finished)
    if is_spent:
        progress.say(f"search: ended by its budget after {len(finished)} candidates; a larger one continues it")
    with only_process(run.path, waits=True):  # workers end at about the same time
        table = _write_trials(run.path, experiment, space.policies, finished, of_trials(finished))
        result = _result(experiment, chosen_proposer(config), space.policies, table, asdict(budget) if is_spent else None)
        mixture = materials.mixture()
        mixture.weights = result.best.weights
        mixture.save_pretrained(run.path / ENSEMBLE, tokenizer=materials.base.tokenizer, front=as_json(result)["front"])
    run.with_cost(total_cost(finished))
    return result


def _evaluator(materials: Materials, space: "WeightSpace", value: "Value", memo: "ScoreMemo") -> "WeightEvaluator":
    from emorl.search.weight_evaluation import WeightEvaluator

    experiment = materials.experiment
    return WeightEvaluator(
        materials.mixture(),
        materials.base.tokenizer,
        materials.splits.validation,
        materials.objectives,
        space,
        experiment.search,
        generation=generation_of(experiment),
        seed=experiment.seed,
        value=value,
        memo=memo,
    )


def _study_name(experiment: Experiment) -> str:
    """Studies of several experiments may share one database."""
    return STUDY_NAME if experiment.search.storage is None else f"{experiment.output.name}-{STUDY_NAME}"


def _write_trials(
    folder: Path, experiment: Experiment, policies: Sequence[str], finished: Sequence[Any], values: Sequence[float]
) -> "pd.DataFrame":
    from emorl.search.trials import trials_table

    table = trials_table(finished, list(experiment.objectives), values)
    table = table.rename(columns={name: f"weight_{name}" for name in policies})
    with written_whole(folder / TRIALS) as temporary:
        table.to_csv(temporary, index=False)
    return table


def restore_trials(experiment: Experiment) -> None:
    """Writes a finished search's `trials.csv` again from its study, where it is missing or damaged; no model is loaded."""
    layout = Layout(experiment.output)
    if not layout.has_result("search"):
        return
    from emorl.evaluation.tables import read_table

    result = read_result(SearchResult, layout.search)
    try:
        read_table(layout.search / TRIALS, ["trial", "value", "front"], "", result.trials)
        return
    except UserError:
        pass
    from emorl.objectives.scalarize import Value
    from emorl.search.spaces.weight_space import WeightSpace
    from emorl.search.study import finished_trials, open_study
    from emorl.search.trials import valuation

    objectives, space = list(experiment.objectives), WeightSpace(tuple(result.best.weights))
    study = open_study(_storage(experiment), objectives, _study_name(experiment))
    finished = finished_trials(study)
    if len(finished) < result.trials:
        raise UserError(f"{layout.search / TRIALS} is damaged, and so is its study; move {layout.search} away and search again")
    of_trials = valuation(Value.of(experiment.value, objectives), space.corners()[: len(space.policies)])
    _write_trials(layout.search, experiment, space.policies, finished, of_trials(finished))


def _storage(experiment: Experiment) -> "str | Path":
    return experiment.search.storage or Layout(experiment.output).search / JOURNAL


def _result(
    experiment: Experiment,
    proposer: str,
    policies: Sequence[str],
    table: "pd.DataFrame",
    ended_by: Mapping[str, float | None] | None,
) -> SearchResult:
    def point(row: Mapping[Any, Any]) -> Point:
        weights = {name: row[f"weight_{name}"] for name in policies}
        return Point(weights, {name: row[f"score_{name}"] for name in experiment.objectives}, row["value"])

    rows = table[table["prompts"] == table["prompts"].max()].to_dict("records")  # lost races are estimates of less
    return SearchResult(
        proposer=proposer,
        scalarize=experiment.value.scalarize,
        preferences=experiment.value.preferences,
        trials=len(table),
        ended_by_budget=ended_by,
        best=point(max(rows, key=lambda row: row["value"])),
        front=[point(row) for row in rows if row["front"]],
    )


_DEPENDS_ON = (
    *TRAINING, "objectives", "policies", "value", "ensemble", "search", "-search.batch", "-search.memory", "-search.storage",
    "-search.trials", "-search.seconds", "-search.tokens",  # a budget may be raised
)  # fmt: skip
STAGE = Stage("search", SearchResult, check, _DEPENDS_ON, work, is_enough, is_shared=True, leaves=[TRIALS, ENSEMBLE])


def performed(experiment: Experiment, progress: Progress, materials: Materials) -> SearchResult:
    """The stage, whose lock its workers share."""
    restore_trials(experiment)
    return perform(STAGE, experiment, progress, materials)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser, "objectives", "value", "ensemble", "search", "generation", "policies")
    parser.add_argument("--storage", metavar="URL", help="an Optuna storage, the same as search.storage=URL")


def command(options: argparse.Namespace) -> None:
    overrides = [f"search.storage={options.storage}"] if options.storage else []
    experiment = load(options, overrides)
    result = performed(experiment, Console(), Materials(experiment))
    if options.json:
        print(json.dumps(as_json(result), indent=2))
        return
    from emorl.reporting.tables import print_front

    print_front(result)
