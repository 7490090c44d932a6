"""Methods at equal budgets (`emorl compare experiment.yaml`): the ensemble, and what a user could train instead.

Every method of `compare.methods` is trained once per seed, with as many training prompts and samples as the ensemble's policies
have together; the ensemble's and the soups' weights are searched on the validation prompts; all are scored on test prompts
that neither training nor search has seen. Departures from EMORL's comparison: the same LoRA for everyone (theirs: LoRA against
full tuning), equal prompts instead of each method's own stopping time (both are reported), every method's KL term acts.

A method's best point is what it chose itself on the validation prompts: the best of the search, or the policy. Its hypervolume
is that of all points it offers: that one and up to `evaluate.front_points` of the front, or one policy for each preference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emorl.config.experiment import Experiment
from emorl.evaluation.bootstrap import Offer, difference, resampled
from emorl.evaluation.pareto import hypervolume, reference_point
from emorl.evaluation.scoring import check_generation, summarize
from emorl.objectives.loading import check_objectives, load_objective
from emorl.reporting.attacks import load_splits
from emorl.reporting.methods import COMBINED, MethodRun, method_runs
from emorl.reporting.offers import (
    ALONE_METHOD,
    BASE_METHOD,
    Point,
    consumption,
    decode_seconds,
    points_of,
    score_points,
)
from emorl.runs.progress import Progress, Silent
from emorl.runs.run import only_process, read_json, write_json, written_whole
from emorl.search.weight_search import check_proposer, search
from emorl.training.policy import train

FIRST = "ensemble"
"""the method that all others are compared with, where it takes part"""


def compare_methods(experiment: Experiment, progress: Progress | None = None) -> Path:
    """Trains, searches and scores what is missing; returns the directory of the comparison, `compare/` in the output.

    It holds `seeds.csv` (one row per method and seed), `points.csv` (every trade-off offered, with its scores) and
    `result.json` (methods with mean and standard deviation over seeds, differences from the ensemble with intervals). Every
    stage continues where it was interrupted; seeds may be trained by several processes, each with its own `compare.seeds`.

    Raises:
        UserError: settings that contradict a comparison, or what a stage refuses.
    """
    progress = progress or Silent()
    check_generation(experiment.generation)
    check_objectives(experiment.objectives)
    check_proposer(experiment.search)
    runs = method_runs(experiment)
    for run in runs:
        _prepare(run, progress)
    path = experiment.output / "compare"
    with only_process(path):
        offered = _score(experiment, runs, progress)
        _write(experiment, offered, _decode_costs(experiment, runs, path, progress), path)
    return path


def read_comparison(experiment: Experiment) -> dict[str, Any]:
    """What a finished comparison wrote to `result.json`."""
    return read_json(experiment.output / "compare" / "result.json")


def _prepare(run: MethodRun, progress: Progress) -> None:
    for experiment in run.experiments:
        if experiment.policies is None:
            for name in experiment.policy_names:
                train(experiment, name, _Named(progress, f"seed {run.seed}, {run.method}: "))
        if run.method in COMBINED:
            search(experiment, _Named(progress, f"seed {run.seed}, {run.method}: "))


class _Named:
    """Says whose progress it is."""

    def __init__(self, progress: Progress, prefix: str) -> None:
        self._progress, self._prefix = progress, prefix
        self.bar = progress.bar

    def say(self, line: str) -> None:
        self._progress.say(self._prefix + line)

    def warn(self, line: str) -> None:
        self._progress.warn(self._prefix + line)


Offered = dict[str, dict[int, list[Point]]]
"""method -> seed -> its points, the best first"""


def _score(experiment: Experiment, runs: Sequence[MethodRun], progress: Progress) -> Offered:
    """Scores all points on the test prompts. The bare base and each policy alone come with the ensemble."""
    data = load_splits(runs[0].experiments[0]).test  # split alike for all seeds
    objectives = [load_objective(name, config) for name, config in experiment.objectives.items()]
    offered: Offered = {}
    for run in runs:
        methods = [BASE_METHOD, ALONE_METHOD, run.method] if run.method == FIRST else [run.method]
        for method in methods:
            points = []
            experiments = run.experiments
            if len(experiments) > 1:  # one policy for each preference: the best one comes first
                experiments = sorted(experiments, key=_validation_mean, reverse=True)
            for one in experiments:
                found = points_of(one, method)
                score_points(one, found, data, objectives, progress)
                points += found
            offered.setdefault(method, {})[run.seed] = points
    return offered


def _validation_mean(experiment: Experiment) -> float:
    """The mean score of a single policy on the validation prompts."""
    [name] = experiment.policy_names
    scores = read_json(experiment.training_of(name) / "result.json")["scores"]
    return sum(scores.values()) / len(scores)


def _decode_costs(experiment: Experiment, runs: Sequence[MethodRun], path: Path, progress: Progress) -> dict[str, float]:
    """Seconds of decoding by method, of the first seed's policies; measured once."""
    file = path / "decode.json"
    first = {run.method: run.experiments[0] for run in runs if run.seed == runs[0].seed}
    measured = read_json(file) if file.exists() else {}
    if measured.get("seeds") == experiment.compare.seeds and measured["seconds"].keys() >= first.keys():
        return measured["seconds"]  # of other seeds: measured while their trainings ran
    progress.say(f"compare: timing the decoding of {len(first)} methods")
    seconds = decode_seconds(first, load_splits(experiment).test["prompt"])
    write_json(file, {"seeds": experiment.compare.seeds, "seconds": seconds})
    return seconds


def _write(experiment: Experiment, offered: Offered, seconds: Mapping[str, float], path: Path) -> None:
    names = list(experiment.objectives)
    tables = {
        point.table: pd.read_parquet(point.table) for seeds in offered.values() for own in seeds.values() for point in own
    }
    points = pd.DataFrame(
        [
            {"method": method, "seed": seed, "point": point.name, "best": index == 0,
             **{f"weight_{name}": weight for name, weight in point.weights.items()}, **summarize(tables[point.table], names)}
            for method, seeds in offered.items() for seed, own in seeds.items() for index, point in enumerate(own)
        ]
    )  # fmt: skip
    reference = reference_point(points[names])
    offers = {
        method: [Offer(_scores([tables[point.table] for point in own], names), 0) for own in seeds.values()]
        for method, seeds in offered.items()
    }
    statistics = resampled(offers, reference, experiment.compare.bootstrap, experiment.seed)
    by_run = points.groupby(["method", "seed"])
    volumes = {key: hypervolume(own[names], reference) for key, own in by_run}
    chosen = points[points["best"]].drop(columns=["best", "point"])
    seeds = chosen.assign(
        hypervolume=[volumes[key] for key in zip(chosen["method"], chosen["seed"], strict=True)],
        points=by_run["point"].transform("size"),  # aligned by row
        decode_cost=[_decode_cost(seconds, method) for method in chosen["method"]],
    ).merge(_consumptions(experiment), on=["method", "seed"], how="left")
    for name, table in (("points", points), ("seeds", seeds)):
        with written_whole(path / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False)
    [prompts] = {offer.scores.shape[1] for own in offers.values() for offer in own}
    write_json(path / "result.json", _result(experiment, seeds, statistics, reference, prompts))


def _scores(tables: Sequence[pd.DataFrame], names: Sequence[str]) -> np.ndarray:
    """(N, P, O): a prompt's samples are averaged."""
    return np.stack([table.groupby("prompt_index")[list(names)].mean().to_numpy() for table in tables])


def _decode_cost(seconds: Mapping[str, float], method: str) -> float:
    """Relative to one policy."""
    of_one = "one policy" if method == ALONE_METHOD else method
    return seconds[of_one] / seconds.get("one policy", seconds[BASE_METHOD])


def _consumptions(experiment: Experiment) -> pd.DataFrame:
    """One row per method and seed; what each policy alone consumed is the ensemble's training."""
    rows = []
    for run in method_runs(experiment):
        parts = pd.DataFrame([consumption(one, run.method) for one in run.experiments])
        rows.append({"method": run.method, "seed": run.seed, **parts.sum(skipna=False).to_dict()})
        if run.method == FIRST:
            alone = pd.DataFrame([consumption(one, ALONE_METHOD) for one in run.experiments]).sum(skipna=False)
            rows.append({"method": ALONE_METHOD, "seed": run.seed, **alone.to_dict()})
    return pd.DataFrame(rows)


def _result(
    experiment: Experiment,
    seeds: pd.DataFrame,
    statistics: Mapping[str, tuple[np.ndarray, np.ndarray]],
    reference: Sequence[float],
    test_prompts: int,
) -> dict[str, Any]:
    """Means and standard deviations over seeds, differences from the first method, and its best rivals."""
    numbers = seeds.drop(columns=["seed"]).groupby("method", sort=False)
    mean, deviation = numbers.mean(), numbers.std()
    mean["converged_prompts"] = numbers["converged_prompts"].agg(lambda found: found.mean(skipna=False))  # all seeds, or none
    methods = {
        method: {
            column: {"mean": _known(mean.loc[method, column]), "deviation": _known(deviation.loc[method, column])}
            for column in mean.columns
        }
        for method in mean.index
    }
    first = FIRST if FIRST in statistics else next(iter(statistics))
    rivals = [method for method in statistics if method != first]
    differences = {
        method: {
            measure: asdict(difference(statistics[first][index], statistics[method][index]))
            for index, measure in enumerate(("mean", "hypervolume"))
        }
        for method in rivals
    }
    trained = [method for method in rivals if method not in (BASE_METHOD, ALONE_METHOD)] or rivals
    best_rival = {
        measure: max(trained, key=lambda method, index=index: float(statistics[method][index][0])) if trained else None
        for index, measure in enumerate(("mean", "hypervolume"))
    }
    return {
        "objectives": list(experiment.objectives),
        "seeds": list(experiment.compare.seeds),
        "test_prompts": test_prompts,
        "first": first,
        "methods": methods,
        "differences": differences,
        "best_rival": best_rival,
        "reference_point": dict(zip(experiment.objectives, reference, strict=True)),
        "direction": "maximise",
    }


def _known(number: Any) -> float | None:
    """A number as JSON knows it: one seed has no standard deviation."""
    return None if pd.isna(number) else float(number)
