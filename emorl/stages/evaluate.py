"""Evaluate stage: what was chosen and its rivals, on test prompts that neither training nor search has seen
(`emorl evaluate experiment.yaml`).

Scored are the untrained base, each policy alone, the equal-weights ensemble, the best ensemble of the search, points of its
front, and parameter averaging of the same policies (rewarded soups, arXiv 2306.04488); with `ensemble.aggregate: parameters`
what is called the ensemble averages parameters too. Where `emorl dynamic` has trained a dynamic ensemble, that is scored too,
and what `emorl distill` has made is shown with the scores that it has there.
The run directory holds `completions.parquet` (every scored completion with its system), `summary.csv` (one row per system),
`result.json` (systems, hypervolumes with their reference point) and `hacking.json` (the attacks on the objectives). Systems
scored before an interruption are kept; a finished evaluation gets attacks that it lacks.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emorl.config.experiment import Experiment
from emorl.runs.console import Console
from emorl.runs.layout import ATTACKS, COMPLETIONS, POLICY, SUMMARY, WEIGHTS, Layout
from emorl.runs.progress import Progress
from emorl.runs.results import (
    BASE,
    BEST,
    EvaluationResult,
    Kind,
    SearchResult,
    System,
    TradeOff,
    best_dynamic_ensemble,
    read_result,
    without_nan,
)
from emorl.runs.run import Cost, Run, read_json, write_json, written_whole
from emorl.stages.distill import comparable_result, table_of
from emorl.stages.materials import Materials
from emorl.stages.options import add_experiment, load
from emorl.stages.search import check_mode, restore_trials
from emorl.stages.stage import Stage, perform
from emorl.stages.train import TRAINING

if TYPE_CHECKING:
    from emorl.evaluation.scoring import Evaluation


def check(experiment: Experiment) -> None:
    """Refuses settings of decoding and scoring that are none, and objectives that cannot score."""
    check_mode(experiment)
    from emorl.objectives.loading import check_objectives

    check_objectives(experiment.objectives)
    from emorl.evaluation.perplexity import check_language_model

    check_language_model(experiment.evaluate.perplexity_model)
    from emorl.policies.generation import check_generation

    check_generation(experiment.generation)


def systems_of(experiment: Experiment) -> list[System]:
    """What is compared, once a search has ended."""
    from emorl.evaluation.pareto import chosen_points

    layout, objectives = Layout(experiment.output), list(experiment.objectives)
    search = read_result(SearchResult, layout.search)
    equal = {name: 1 / len(objectives) for name in objectives}
    points = chosen_points(search.front, experiment.evaluate.front_points)
    alone = {name: {other: float(other == name) for other in objectives} for name in objectives}
    has_dynamic = best_dynamic_ensemble(layout) is not None
    return [
        System(BASE, Kind.BASE, {}),
        *(System(f"policy {name}", Kind.POLICY, weights) for name, weights in alone.items()),
        System("ensemble, equal weights", Kind.ENSEMBLE, equal),
        System(BEST, Kind.ENSEMBLE, search.best.weights),
        System("parameter average, equal weights", Kind.PARAMETER_AVERAGE, equal),
        *(System(f"front {number}", Kind.FRONT, point.weights) for number, point in enumerate(points, 1)),
        *([System("dynamic ensemble", Kind.DYNAMIC, {})] if has_dynamic else []),
        *_distilled_systems(experiment),
    ]


def _distilled_systems(experiment: Experiment) -> list[System]:
    weights = Layout(experiment.output).distillation / POLICY / WEIGHTS
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:8] if weights.is_file() else ""
    return [System(name, Kind.DISTILLED, one.weights, digest) for name, one in _distilled(experiment).items()]


def _distilled(experiment: Experiment) -> dict[str, TradeOff]:
    """Name -> trade-off of a distilled adapter that answered the same test prompts; those that were held out belong to its own
    stage."""
    result = comparable_result(experiment)
    trained = [] if result is None else [one for one in result.trade_offs if not one.held_out]
    return {f"distilled, {one.name}": one for one in trained}


def is_enough(experiment: Experiment, result: EvaluationResult) -> bool:
    """Whether the very systems that are there now were compared, and every objective attacked."""
    folder = Layout(experiment.output).evaluation
    return list(result.systems) == systems_of(experiment) and not _not_attacked(experiment, folder)


def work(materials: Materials, run: Run, progress: Progress) -> EvaluationResult:
    """Scores the systems that have no table yet, and attacks the objectives."""
    import pandas as pd

    from emorl.evaluation.attacks import check_references
    from emorl.evaluation.systems import hypervolumes, read_tables, summary_table

    experiment = materials.experiment
    config, objectives, systems = experiment.evaluate, list(experiment.objectives), systems_of(experiment)
    progress.say(f"evaluate: {len(systems)} systems on {experiment.data.test} test prompts")
    if config.attacks:
        check_references(materials.splits, config.references)
    run = _score_missing(materials, systems, run, progress)
    tables = read_tables(run.path / "systems", systems, config.samples)
    completions = pd.concat([table.assign(system=name) for name, table in tables.items()], ignore_index=True)
    with written_whole(run.path / COMPLETIONS) as temporary:
        completions.to_parquet(temporary, index=False)
    summary = summary_table(systems, tables, objectives, experiment.train.collapse.share)
    with written_whole(run.path / SUMMARY) as temporary:
        summary.to_csv(temporary, index=False)
    if _not_attacked(experiment, run.path):
        _attack(materials, run, completions, progress)
    return EvaluationResult(objectives, systems, *hypervolumes(summary, objectives))


def _score_missing(materials: Materials, systems: Sequence[System], run: Run, progress: Progress) -> Run:
    from emorl.evaluation.perplexity import load_language_model, with_perplexity
    from emorl.evaluation.systems import file_of
    from emorl.objectives.loading import outside_range

    config = materials.experiment.evaluate
    files = {system.name: run.path / "systems" / file_of(system, config.samples) for system in systems}
    missing = [system for system in systems if not files[system.name].exists()]
    language_model = load_language_model(config.perplexity_model) if config.perplexity_model and missing else None
    objectives, models = materials.objectives, {}
    with progress.bar("evaluate", len(systems), done=len(systems) - len(missing)) as bar:
        for system in missing:
            evaluation = _evaluate(materials, system, objectives, models)
            table = evaluation.table
            if language_model is not None:
                table = with_perplexity(table, language_model, config.batch)
            with written_whole(files[system.name]) as temporary:
                table.to_parquet(temporary, index=False)
            run = run.add_cost(evaluation.cost)
            bar.advance(1, system.name)
    for line in outside_range(objectives):
        progress.warn(line)
    return run


def _evaluate(materials: Materials, system: System, objectives: Sequence[Any], models: dict[str, Any]) -> "Evaluation":
    """One system on the test prompts; `models` remembers what was combined for the others."""
    from emorl.evaluation.systems import evaluate_weights

    experiment, data = materials.experiment, materials.splits.test
    if system.kind == Kind.DYNAMIC:
        return _evaluate_dynamic(experiment, data, objectives)
    if system.kind == Kind.DISTILLED:
        return _read_distilled(experiment, system)
    averaged = system.kind == Kind.PARAMETER_AVERAGE
    way = BASE if system.kind == Kind.BASE else "parameters" if averaged else experiment.ensemble.aggregate
    if way not in models:
        models[way] = materials.base.model if way == BASE else materials.mixture(way)
    generation, config = experiment.generation, experiment.evaluate
    return evaluate_weights(
        models[way], materials.base.tokenizer, data, objectives, generation, config, system.weights, experiment.seed
    )


def _read_distilled(experiment: Experiment, system: System) -> "Evaluation":
    """What its own stage has scored on the same test prompts."""
    import pandas as pd

    from emorl.evaluation.scoring import Evaluation
    from emorl.training.retained import NATS, TOKENS

    layout = Layout(experiment.output)
    table = table_of(layout.distillation, _distilled(experiment)[system.name], "distilled", experiment.evaluate.samples)
    return Evaluation(pd.read_parquet(table).drop(columns=[NATS, TOKENS]), Cost())


def _evaluate_dynamic(experiment: Experiment, data: Any, objectives: Sequence[Any]) -> "Evaluation":
    """As it was trained; the last answer to each prompt."""
    import pandas as pd

    from emorl.dynamic.ensemble import DynamicEnsemble
    from emorl.evaluation.scoring import Evaluation, cost_of, score
    from emorl.policies.conversation import prompt_text

    folder = best_dynamic_ensemble(Layout(experiment.output))
    assert folder is not None, "it is one of the systems"
    start, ensemble, prompts = time.perf_counter(), DynamicEnsemble.from_pretrained(folder), list(data["prompt"])
    rows = [
        (index, sample, prompt_text(prompts[index]), answer.text, answer.tokens)
        for sample in range(experiment.evaluate.samples)
        for index, answer in ensemble.last_answers(prompts, seed=sample * len(prompts), batch=experiment.evaluate.batch)
    ]
    completions = pd.DataFrame(rows, columns=["prompt_index", "sample", "prompt", "completion", "tokens"])
    table = score(completions, data, objectives)
    return Evaluation(table, cost_of(table, len(objectives), time.perf_counter() - start))


def _known_attacks(experiment: Experiment, folder: Path) -> list[dict[str, Any]]:
    """The objectives that were attacked before, against the same references."""
    before = read_json(folder / ATTACKS) if (folder / ATTACKS).exists() else {"references": None, "objectives": []}
    return before["objectives"] if before["references"] == experiment.evaluate.references else []


def _not_attacked(experiment: Experiment, folder: Path) -> list[str]:
    """Objectives that are still to be attacked."""
    known = {check["objective"] for check in _known_attacks(experiment, folder)}
    return [name for name in experiment.objectives if name not in known] if experiment.evaluate.attacks else []


def _attack(materials: Materials, run: Run, completions: Any, progress: Progress) -> None:
    """Writes `hacking.json`: how alike each system's answers are, and each objective under attack."""
    from emorl.evaluation.attacks import alike_by_system, attacked

    experiment = materials.experiment
    references, checks = experiment.evaluate.references, _known_attacks(experiment, run.path)
    content = {"references": references, "objectives": checks, "systems": alike_by_system(completions)}
    with progress.bar("attack", len(experiment.objectives), done=len(checks)) as bar:
        for name in _not_attacked(experiment, run.path):
            start = time.perf_counter()
            check = attacked(materials.objective(name), materials.splits, references, completions, experiment.seed)
            checks.append(asdict(check))
            write_json(run.path / ATTACKS, without_nan(content))
            run = run.add_cost(Cost(reward_calls=check.scored, seconds=time.perf_counter() - start))
            bar.advance(1, name)


_DEPENDS_ON = (
    *TRAINING, "objectives", "policies", "value", "ensemble", "search", "-search.storage", "evaluate", "-evaluate.attacks",
    "-evaluate.references", "-evaluate.front_points", "-evaluate.batch",
)  # fmt: skip
STAGE = Stage("evaluate", EvaluationResult, check, _DEPENDS_ON, work, is_enough, leaves=[COMPLETIONS, SUMMARY])


def performed(experiment: Experiment, progress: Progress, materials: Materials) -> EvaluationResult:
    """The stage, and the search's table of trials, which is shown beside what it finds."""
    restore_trials(experiment)
    return perform(STAGE, experiment, progress, materials)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser, "objectives", "generation", "evaluate", "ensemble", "policies")


def command(options: argparse.Namespace) -> None:
    experiment = load(options)
    layout = Layout(experiment.output)
    if not layout.has_result("search") and layout.has_result("dynamic/comparison"):
        from emorl.stages.dynamic import print_dynamic

        print_dynamic(experiment.output, options.json)  # which compares on the test prompts already
        return
    performed(experiment, Console(), Materials(experiment))
    print_evaluation(experiment.output, options.json)


def print_evaluation(output: Path, as_json: bool) -> None:
    """The finished evaluation as tables, or as JSON."""
    from emorl.reporting.tables import evaluation_json
    from emorl.reporting.tables import print_evaluation as print_tables

    if as_json:
        print(json.dumps(evaluation_json(output), indent=2))
    else:
        print_tables(output)
