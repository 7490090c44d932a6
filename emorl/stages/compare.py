"""Compare stage: the ensemble at equal budgets, and what a user could train instead (`emorl compare experiment.yaml`).

Every method of `compare.methods` is trained once per seed, with as many training prompts and samples as the ensemble's policies
have together; the ensemble's and the soups' weights are searched on the validation prompts; all are scored on test prompts
that neither training nor search has seen. Departures from EMORL's comparison: the same LoRA for everyone (theirs: LoRA against
full tuning), equal prompts instead of each method's own stopping time (both are reported), every method's KL term acts.

A method's best point is what it chose itself on the validation prompts: the best of the search, or the policy. Its hypervolume
is that of all points it offers: that one and up to `evaluate.front_points` of the front, or one policy for each preference.

Each method and seed is an experiment of its own in the output. The run directory `compare` holds `seeds.csv` (a row for each
method and seed), `points.csv` (every trade-off offered, with its scores) and `result.json`. Seeds may be trained by several
processes, each with its own `compare.seeds`.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emorl.config.experiment import Experiment
from emorl.config.places import check_places
from emorl.runs.console import Console
from emorl.runs.layout import DECODE, POINTS, SEEDS, Layout
from emorl.runs.progress import Progress
from emorl.runs.results import BASE, MethodsResult, TrainingResult, as_json, read_result, write_result
from emorl.runs.run import only_process, read_json, write_json, written_whole
from emorl.stages import search, train
from emorl.stages.materials import Materials
from emorl.stages.methods import COMBINED, MethodRun, method_runs
from emorl.stages.options import add_experiment, load
from emorl.stages.stage import keep_experiment

if TYPE_CHECKING:
    from emorl.evaluation.methods import Offered, OfferedPoint


def check(experiment: Experiment) -> None:
    """Refuses settings that contradict a comparison, or what training and search refuse, before the first method is trained."""
    check_places(experiment)
    from emorl.objectives.loading import check_objectives

    check_objectives(experiment.objectives)
    runs = method_runs(experiment)
    search.check(experiment)
    for run in runs:
        if run.seed == runs[0].seed:  # the others differ in nothing else
            for child in run.experiments:
                train.check(child)


def performed(experiment: Experiment, progress: Progress, materials: Materials) -> MethodsResult:
    """Trains, searches and scores what is missing. Not one run but many: each of them goes on where it was interrupted."""
    check(experiment)
    runs = method_runs(experiment)
    for run in runs:
        named = _Named(progress, f"seed {run.seed}, {run.method}: ")
        for child in run.experiments:
            if child.policies is None:
                train.performed(child, named, materials.of(child))
            if run.method in COMBINED:
                search.performed(child, named, materials.of(child))
    folder = Layout(experiment.output).comparison
    with only_process(folder):
        offered = _score(materials, runs, progress)
        result = _write(experiment, runs, offered, _decode_costs(materials, runs, folder, progress), folder)
    keep_experiment(experiment)
    return result


class _Named:
    """Says whose progress it is."""

    def __init__(self, progress: Progress, prefix: str) -> None:
        self._progress, self._prefix = progress, prefix
        self.bar = progress.bar

    def say(self, line: str) -> None:
        self._progress.say(self._prefix + line)

    def warn(self, line: str) -> None:
        self._progress.warn(self._prefix + line)


def _score(materials: Materials, runs: Sequence[MethodRun], progress: Progress) -> "Offered":
    """Scores all points on the test prompts. The bare base and each policy alone come with the ensemble."""
    from emorl.evaluation.methods import ALONE, FIRST
    from emorl.stages.offers import points_of, score_points

    data = materials.of(runs[0].experiments[0]).splits.test  # split alike for all seeds
    objectives = materials.objectives
    offered: dict[str, dict[int, list[OfferedPoint]]] = {}
    for run in runs:
        for method in [BASE, ALONE, run.method] if run.method == FIRST else [run.method]:
            children, points = run.experiments, []
            if len(children) > 1:  # one policy for each preference: the best one comes first
                children = sorted(children, key=_validation_mean, reverse=True)
            for child in children:
                of_child = points_of(child, method)
                score_points(materials.of(child), of_child, data, objectives, progress)
                points += of_child
            offered.setdefault(method, {})[run.seed] = points
    return offered


def _validation_mean(experiment: Experiment) -> float:
    """The mean score of a single policy on the validation prompts."""
    [name] = experiment.policy_names
    scores = read_result(TrainingResult, Layout(experiment.output).training(name)).scores
    return sum(scores.values()) / len(scores)


def _decode_costs(materials: Materials, runs: Sequence[MethodRun], folder: Path, progress: Progress) -> dict[str, float]:
    """Seconds of decoding by method, of the first seed's policies; measured once."""
    from emorl.evaluation.decode_time import decode_seconds
    from emorl.stages.offers import timed_models

    file, seeds = folder / DECODE, materials.experiment.compare.seeds
    first = {run.method: run.experiments[0] for run in runs if run.seed == runs[0].seed}
    measured = read_json(file) if file.exists() else {}
    if measured.get("seeds") == seeds and measured["seconds"].keys() >= first.keys():
        return measured["seconds"]  # of other seeds: measured while their trainings ran
    progress.say(f"compare: timing the decoding of {len(first)} methods")
    models = timed_models({method: materials.of(child) for method, child in first.items()})
    seconds = decode_seconds(models, materials.base.tokenizer, materials.splits.test["prompt"])
    write_json(file, {"seeds": seeds, "seconds": seconds})
    return seconds


def _write(
    experiment: Experiment, runs: Sequence[MethodRun], offered: "Offered", decode: Mapping[str, float], folder: Path
) -> MethodsResult:
    from emorl.evaluation.methods import methods_tables

    config = experiment.compare
    tables = methods_tables(
        offered, list(experiment.objectives), _consumed(runs), decode, resamples=config.bootstrap, seed=experiment.seed
    )
    for name, table in ((POINTS, tables.points), (SEEDS, tables.seeds)):
        with written_whole(folder / name) as temporary:
            table.to_csv(temporary, index=False)
    write_result(folder, tables.result)
    return tables.result


def _consumed(runs: Sequence[MethodRun]) -> Any:
    """One row per method and seed; what each policy alone consumed is the ensemble's training."""
    import pandas as pd

    from emorl.evaluation.methods import ALONE, FIRST
    from emorl.stages.offers import consumption

    rows = []
    for run in runs:
        for method in (run.method, *([ALONE] if run.method == FIRST else [])):
            parts = pd.DataFrame([consumption(child, method, number == 0) for number, child in enumerate(run.experiments)])
            rows.append({"method": method, "seed": run.seed, **parts.sum(skipna=False).to_dict()})
    return pd.DataFrame(rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    blocks = ("objectives", "seed", "generation", "train", "value", "ensemble", "search", "evaluate", "compare")
    add_experiment(parser, *blocks)


def command(options: argparse.Namespace) -> None:
    experiment = load(options)
    result = performed(experiment, Console(), Materials(experiment))
    if options.json:
        print(json.dumps(as_json(result), indent=2))
        return
    from emorl.reporting.method_tables import method_tables

    print(method_tables(result))
