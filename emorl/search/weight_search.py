"""Search stage: finds aggregation weights on the validation prompts (`emorl search experiment.yaml`).

Every candidate faces the same prompts, and the same random numbers where decoding samples. The search's own best score is a
maximum over noisy estimates: it is stored as such, and what is chosen is scored again on the test prompts by the
comparison stage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from emorl.aggregation.ensemble import BASE_POLICY
from emorl.config import UserError, nearest
from emorl.config.experiment import Experiment, SearchConfig
from emorl.config.yaml import as_mapping
from emorl.evaluation.memo import ScoreMemo
from emorl.evaluation.scoring import check_generation
from emorl.objectives.loading import check_objectives, outside_range
from emorl.objectives.scalarize import importance_of, scalarize
from emorl.runs.layout import policy_directories, training_settings
from emorl.runs.progress import Progress, Silent
from emorl.runs.run import open_run, read_json, write_json, written_whole
from emorl.search.proposers.hierarchical_grid import HierarchicalGrid
from emorl.search.proposers.optuna_samplers import SAMPLERS, OptunaProposer
from emorl.search.proposers.simplex_refinement import SimplexRefinement
from emorl.search.spaces.weight_space import WeightSpace
from emorl.search.study import Budget, Finished, Proposer, Valuation, finished_trials, open_study
from emorl.search.study import search as run_search
from emorl.search.trials import total_cost, trials_table, valuation
from emorl.search.weight_evaluation import ScoreValue, WeightEvaluator

STUDY_NAME = "weights"
GRIDS = {"hierarchical_grid": HierarchicalGrid, "simplex_refinement": SimplexRefinement}
AUTO = "auto"
_DEFAULT_TRIALS = 100
_NOT_OF_THE_RESULT = ("batch", "memory", *(field.name for field in fields(Budget)))  # a budget may be raised


def search(experiment: Experiment, progress: Progress | None = None) -> Path:
    """Searches the weights of the trained policies; returns the run directory.

    It holds `trials.csv` (every candidate with its scores and standard errors) and `result.json` (the best candidate, and
    the front over all objectives). A finished search is skipped; one that was interrupted, or ended by a budget that is
    larger now, continues.

    Raises:
        UserError: policies missing, an unknown proposer or generation setting, a damaged journal, a run directory of
            another search.
    """
    progress = progress or Silent()
    check_proposer(experiment.search)
    check_mode(experiment)
    check_generation({**experiment.generation, **experiment.search.generation})
    check_objectives(experiment.objectives)
    adapters = policy_directories(experiment)
    run = open_run(experiment.output / "search", "search", _identity(experiment))
    budget = _budget(experiment.search)
    if run.finished and read_result(experiment).get("ended_by_budget") in (None, asdict(budget)):
        progress.say(f"search: finished before, in {run.path}")
        return run.path
    objectives = list(experiment.objectives)
    space = WeightSpace((*adapters, *([BASE_POLICY] if experiment.ensemble.include_base else [])))
    value = valuation(experiment, space.corners()[: len(space.policies)])
    proposer, expected = _proposer(experiment, space, value)
    progress.say(f"search: {chosen_proposer(experiment.search)} over the weights of {', '.join(space.policies)}")
    memo = ScoreMemo(run.path / "scores.sqlite")
    evaluator = WeightEvaluator.load(experiment, adapters, space, _score_value(experiment), memo)
    study = open_study(experiment.search.storage or run.path / "journal.log", objectives, _study_name(experiment))
    known = finished_trials(study)
    if known:
        progress.say(f"search: continues behind {len(known)} candidates in {run.path}")
    evaluator.remember(known)
    with memo, progress.bar("search weights", expected, done=len(known)) as bar:
        seen = len(known)

        def on_finished(finished: Sequence[Finished]) -> None:
            nonlocal seen
            bar.advance(len(finished) - seen, _best_so_far(finished, value))
            seen = len(finished)

        finished = run_search(
            study,
            proposer,
            evaluator,
            space.distributions,
            batch=experiment.search.batch,
            budget=budget,
            on_finished=on_finished,
        )
    progress.say(f"search: {evaluator.describe_work()}")
    for line in outside_range(evaluator.objectives):
        progress.warn(line)
    room = budget.room(finished)
    spent = room is not None and room < 1
    if spent:
        progress.say(f"search: ended by its budget after {len(finished)} candidates; a larger one continues it")
    _write_results(run.path, experiment, space, finished, value(finished), budget if spent else None)
    run.with_cost(total_cost(finished)).finish()
    return run.path


def check_proposer(config: SearchConfig) -> None:
    names = [AUTO, *GRIDS, *SAMPLERS]
    if config.proposer not in names:
        raise UserError(f"search.proposer: no proposer is called {config.proposer!r}; {nearest(config.proposer, names)}")


def check_mode(experiment: Experiment) -> None:
    if experiment.train.mode != "ensemble":
        raise UserError(
            f"train.mode={experiment.train.mode} trains one policy, which has no weights to search: use `emorl train`; "
            "`emorl compare` sets it beside the ensemble"
        )


def chosen_proposer(config: SearchConfig) -> str:
    """What `auto` stands for: the proposer that `benchmarks/proposers.py` found best, whatever the number of policies."""
    return "simplex_refinement" if config.proposer == AUTO else config.proposer


def _identity(experiment: Experiment) -> dict[str, Any]:
    whole = as_mapping(experiment)
    what = {**training_settings(experiment), "objectives": whole["objectives"]}
    how = {key: value for key, value in whole["search"].items() if key not in _NOT_OF_THE_RESULT}
    what |= {"value": whole["value"], "ensemble": whole["ensemble"]}
    return {**what, "search": how, **({} if experiment.policies is None else {"policies": whole["policies"]})}


def _budget(config: SearchConfig) -> Budget:
    """The configured budget; without any, samplers that never end get a number of trials."""
    given = Budget(config.trials, config.seconds, config.tokens)
    return Budget(trials=_DEFAULT_TRIALS) if given == Budget() and config.proposer in SAMPLERS else given


def _study_name(experiment: Experiment) -> str:
    """Studies of several experiments may share one database."""
    return STUDY_NAME if experiment.search.storage is None else f"{experiment.output.name}-{STUDY_NAME}"


def _score_value(experiment: Experiment) -> ScoreValue:
    """The configured scalarisation of mean scores (..., O), for races."""
    importance = importance_of(list(experiment.objectives), experiment.value.preferences)

    def value(scores: np.ndarray) -> np.ndarray:
        flat = scores.reshape(-1, scores.shape[-1])
        return scalarize(flat, experiment.value.scalarize, importance, flat).reshape(scores.shape[:-1])

    return value


def _proposer(experiment: Experiment, space: WeightSpace, value: Valuation) -> tuple[Proposer, int]:
    """The proposer, and about how many trials it will take."""
    config, name = experiment.search, chosen_proposer(experiment.search)
    if name in GRIDS:
        grid = GRIDS[name](space, config.levels, value)
        return grid, min(grid.expected_trials, config.trials or grid.expected_trials)
    sampler = OptunaProposer(name, space, len(experiment.objectives), value, experiment.seed)
    return sampler, config.trials or _DEFAULT_TRIALS


def _best_so_far(finished: Sequence[Finished], value: Valuation) -> str:
    if not finished:
        return ""
    best, trial = max(zip(value(finished), finished, strict=True), key=lambda pair: pair[0])
    weights = " ".join(f"{name} {weight:.2f}" for name, weight in trial.params.items())
    return f"best {best:.3f} at {weights}"


def _write_results(
    path: Path,
    experiment: Experiment,
    space: WeightSpace,
    finished: Sequence[Finished],
    values: Sequence[float],
    ended_by: Budget | None,
) -> None:
    table = trials_table(finished, list(experiment.objectives), values).rename(
        columns={name: f"weight_{name}" for name in space.policies}
    )
    with written_whole(path / "trials.csv") as temporary:
        table.to_csv(temporary, index=False)

    def point(row: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "weights": {name: row[f"weight_{name}"] for name in space.policies},
            "scores": {name: row[f"score_{name}"] for name in experiment.objectives},
            "value": row["value"],
        }

    rows = table[table["prompts"] == table["prompts"].max()].to_dict("records")  # lost races are estimates of less
    result = {
        "proposer": chosen_proposer(experiment.search),
        "scalarize": experiment.value.scalarize,
        "preferences": dict(experiment.value.preferences),
        "prompts": "validation",
        "trials": len(table),
        "ended_by_budget": None if ended_by is None else asdict(ended_by),
        "best": point(max(rows, key=lambda row: row["value"])),
        "front": [point(row) for row in rows if row["front"]],
    }
    write_json(path / "result.json", result)


def read_result(experiment: Experiment) -> dict[str, Any]:
    """What a finished search wrote to `result.json`."""
    return read_json(experiment.output / "search" / "result.json")


def silence_optuna() -> None:
    """Optuna reports every trial by default; the progress bar does that here."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
