"""Comparison stage: what was chosen and its rivals, on test prompts that neither training nor search has seen
(`emorl evaluate experiment.yaml`).

Compared are the untrained base, each policy alone, the equal-weights ensemble, the best ensemble of the search, points of
its front, and parameter averaging of the same policies (rewarded soups, arXiv 2306.04488); with `ensemble.aggregate:
parameters` what is called the ensemble averages parameters too. Where `emorl dynamic` has trained a controller, that is compared too.
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emorl.aggregation.ensemble import BASE_POLICY, MIXTURES, ParameterAverage
from emorl.config import UserError
from emorl.config.experiment import Experiment
from emorl.config.yaml import as_mapping
from emorl.dynamic.ensemble import DynamicEnsemble, best_ensemble
from emorl.evaluation.pareto import front, hypervolume, reference_point
from emorl.evaluation.perplexity import check_language_model, load_language_model, with_perplexity
from emorl.evaluation.scoring import Evaluation, check_generation, cost_of, evaluate, score, summarize
from emorl.objectives.loading import Objective, load_objective, outside_range
from emorl.policies.base import load_base, read_policies
from emorl.policies.conversation import prompt_text
from emorl.reporting.attacks import attack, attacks_missing, load_splits
from emorl.reporting.results import BASE
from emorl.runs.layout import policy_directories, training_settings
from emorl.runs.progress import Progress, Silent
from emorl.runs.run import Run, only_process, open_run, write_json, written_whole
from emorl.search.weight_search import check_mode, read_result

DYNAMIC = "dynamic"


@dataclass(frozen=True)
class System:
    """One line of the comparison. `kind`: base, policy, ensemble, front, parameter_average or dynamic; weights by policy
    name."""

    name: str
    kind: str
    weights: Mapping[str, float]


def compare(experiment: Experiment, progress: Progress | None = None) -> Path:
    """Scores all systems on the test prompts; returns the run directory.

    It holds `completions.parquet` (every scored completion with its system), `summary.csv` (one row per system),
    `result.json` (systems, hypervolumes with their reference point) and `hacking.json` (the attacks on the objectives).
    Systems scored before an interruption are kept; a finished comparison gets attacks that it lacks.
    """
    progress = progress or Silent()
    check_mode(experiment)
    check_generation(experiment.generation)
    check_language_model(experiment.evaluate.perplexity_model)
    path = experiment.output / "evaluate"
    found = read_result(experiment)
    systems = _systems(list(experiment.objectives), found, experiment.evaluate.front_points)
    with only_process(path):
        run = open_run(path, "evaluate", _identity(experiment, systems))
        if best_ensemble(experiment.output) is not None:  # not in the identity: it may come later
            systems = [*systems, System("dynamic ensemble", DYNAMIC, {})]
        scored = all(_table_path(path, system).exists() for system in systems)
        if run.finished and scored and not attacks_missing(experiment, path):
            progress.say(f"evaluate: finished before, in {path}")
            return path
        progress.say(f"evaluate: {len(systems)} systems on {experiment.data.test} test prompts")
        run = _score_missing(experiment, systems, run, progress)
        _write_tables(experiment, systems, path)
        if attacks_missing(experiment, path):
            run = attack(experiment, run, progress)
        run.finish()
    return path


def _identity(experiment: Experiment, systems: Sequence[System]) -> dict[str, Any]:
    """What the scores depend on; attacks change none of them."""
    whole = as_mapping(experiment)
    how = {key: value for key, value in whole["evaluate"].items() if key not in ("attacks", "references")}
    if how["perplexity_model"] is None:
        del how["perplexity_model"]  # runs from before this key are the same
    del whole["output"], whole["compare"], whole["dynamic"]
    return {
        **whole,
        **training_settings(experiment),
        "evaluate": how,
        "systems": [asdict(system) for system in systems],
    }


def _systems(objectives: Sequence[str], found: Mapping[str, Any], front_points: int) -> list[System]:
    equal = {name: 1 / len(objectives) for name in objectives}
    best = found["best"]["weights"]
    chosen = spread([[point["scores"][name] for name in objectives] for point in found["front"]], front_points)
    points = [found["front"][index]["weights"] for index in chosen]
    return [
        System(BASE, "base", {}),
        *(System(f"policy {name}", "policy", {other: float(other == name) for other in objectives}) for name in objectives),
        System("ensemble, equal weights", "ensemble", equal),
        System("ensemble, best found", "ensemble", best),
        System("parameter average, equal weights", "parameter_average", equal),
        *(System(f"front {number}", "front", weights) for number, weights in enumerate(points, 1)),
    ]


def spread(scores: Sequence[Sequence[float]], most: int) -> list[int]:
    """Indices of at most `most` points with scores (N, O): the best of each objective, then always the one farthest from those
    chosen."""
    points = np.array(scores)  # (N, O)
    scaled = (points - points.min(0)) / np.maximum(points.max(0) - points.min(0), 1e-12)
    chosen = list(dict.fromkeys(int(index) for index in points.argmax(0)))[:most]
    while len(chosen) < min(most, len(points)):
        distance = np.linalg.norm(scaled[:, None] - scaled[chosen][None], axis=-1).min(1)  # (N,)
        distance[chosen] = -1
        chosen.append(int(distance.argmax()))
    return sorted(chosen, key=lambda index: tuple(-points[index]))


def _score_missing(experiment: Experiment, systems: Sequence[System], run: Run, progress: Progress) -> Run:
    """Scores each system that has no table yet."""
    missing = [system for system in systems if not _table_path(run.path, system).exists()]
    if not missing:
        return run
    splits = load_splits(experiment)
    perplexity_model = experiment.evaluate.perplexity_model
    language_model = load_language_model(perplexity_model) if perplexity_model else None
    objectives = [load_objective(name, config) for name, config in experiment.objectives.items()]
    base = load_base(experiment.base)
    adapters = read_policies(policy_directories(experiment), base, experiment.ensemble.adapter_scale)
    include_base = any(BASE_POLICY in system.weights for system in systems)
    try:
        models: dict[str, PreTrainedModel] = {
            "base": base.model,
            "ensemble": MIXTURES[experiment.ensemble.aggregate](base.model, adapters, include_base=include_base),
            "parameter_average": ParameterAverage(base.model, adapters, include_base=include_base),
        }
    except ValueError as error:
        raise UserError(str(error)) from None
    with progress.bar("evaluate", len(systems), done=len(systems) - len(missing)) as bar:
        for system in missing:
            if system.kind == DYNAMIC:
                evaluation = _evaluate_dynamic(experiment, splits.test, objectives)
            else:
                model = models[system.kind if system.kind in models else "ensemble"]
                evaluation = evaluate_weights(
                    experiment, model, base.tokenizer, splits.test, objectives, system.weights, seed=experiment.seed
                )
            table = evaluation.table
            if language_model is not None:
                table = with_perplexity(table, language_model, experiment.evaluate.batch)
            with written_whole(_table_path(run.path, system)) as temporary:
                table.to_parquet(temporary, index=False)
            run = run.add_cost(evaluation.cost)
            bar.advance(1, system.name)
    for line in outside_range(objectives):
        progress.warn(line)
    return run


def _evaluate_dynamic(experiment: Experiment, data: Dataset, objectives: Sequence[Objective]) -> Evaluation:
    """As `evaluate`, of the trained dynamic ensemble, which decodes as it was trained; the last answer to each prompt."""
    directory = best_ensemble(experiment.output)
    assert directory is not None, "it is one of the systems"
    start, ensemble = time.perf_counter(), DynamicEnsemble.from_pretrained(directory)
    prompts = list(data["prompt"])
    rows = [
        {
            "prompt_index": index,
            "sample": sample,
            "prompt": prompt_text(prompts[index]),
            "completion": a.text,
            "tokens": a.tokens,
        }
        for sample in range(experiment.evaluate.samples)
        for index, a in ensemble.last_answers(prompts, seed=sample * len(prompts), batch=experiment.evaluate.batch)
    ]
    table = score(pd.DataFrame(rows), data, objectives)
    return Evaluation(table, cost_of(table, len(objectives), time.perf_counter() - start))


def evaluate_weights(
    experiment: Experiment,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    objectives: Sequence[Objective],
    weights: Mapping[str, float],
    *,
    seed: int,
) -> Evaluation:
    """As `evaluate`, decoding as the experiment says, with weights by policy name; none for a model that mixes nothing."""
    vector = torch.tensor([weights.get(name, 0.0) for name in model.policy_names]) if weights else None  # (K,)
    return evaluate(
        model,
        tokenizer,
        data,
        objectives,
        experiment.generation,
        samples=experiment.evaluate.samples,
        batch=experiment.evaluate.batch,
        seed=seed,
        per_prompt=None if vector is None else {"weights": vector.expand(len(data), -1)},
    )


def _table_path(path: Path, system: System) -> Path:
    return path / "systems" / f"{re.sub('[^a-z0-9]+', '-', system.name.lower())}.parquet"


def _write_tables(experiment: Experiment, systems: Sequence[System], path: Path) -> None:
    objectives = list(experiment.objectives)
    tables = {system.name: pd.read_parquet(_table_path(path, system)) for system in systems}
    completions = pd.concat([table.assign(system=name) for name, table in tables.items()], ignore_index=True)
    with written_whole(path / "completions.parquet") as temporary:
        completions.to_parquet(temporary, index=False)
    summary = summary_table(systems, tables, objectives, experiment.train.collapse.share)
    with written_whole(path / "summary.csv") as temporary:
        summary.to_csv(temporary, index=False)
    write_json(path / "result.json", {"objectives": objectives, "systems": [asdict(s) for s in systems],
                                      **indicators(summary, objectives)})  # fmt: skip


def summary_table(
    systems: Sequence[System], tables: Mapping[str, pd.DataFrame], objectives: Sequence[str], collapse_share: float
) -> pd.DataFrame:
    """One row per system: system, kind, weight_<policy>, what `summarize` gives, completions, tokens;
    `collapsed` where distinct completions fell under `collapse_share` of the base's."""
    rows = [
        {
            "system": system.name,
            "kind": system.kind,
            **{f"weight_{name}": weight for name, weight in system.weights.items()},
            **summarize(tables[system.name], objectives),
            "completions": len(tables[system.name]),
            "tokens": cost_of(tables[system.name], 0, 0.0).tokens,
        }
        for system in systems
    ]
    summary = pd.DataFrame(rows)
    base_share = summary.loc[summary["kind"] == "base", "distinct_share"].iloc[0]
    return summary.assign(
        collapsed=summary["distinct_share"] < collapse_share * base_share, front=front(summary[list(objectives)])
    )


def indicators(summary: pd.DataFrame, objectives: Sequence[str]) -> dict[str, Any]:
    """Hypervolumes (direction: maximise) of what each method offers; the reference point is that of all compared
    systems."""
    names = list(objectives)
    reference = reference_point(summary[names])
    groups = {
        "base": ["base"],
        "policies alone": ["policy"],
        "parameter average": ["parameter_average"],
        "ensemble": ["policy", "ensemble", "front"],  # one-hot weights are the policies alone
    }
    volumes = {
        label: hypervolume(summary.loc[summary["kind"].isin(kinds), names], reference) for label, kinds in groups.items()
    }
    return {
        "hypervolume": volumes,
        "reference_point": dict(zip(names, reference, strict=True)),
        "direction": "maximise",
        "prompts": "test",
    }
