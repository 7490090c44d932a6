"""A finished run directory made of known numbers, in the files the stages write; no model is involved."""

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from emorl.config.experiment import Experiment
from emorl.config.yaml import as_mapping, parse, to_yaml
from emorl.evaluation.hacking import Attack, Attacks, Correlation, Honest, ObjectiveCheck, sameness
from emorl.evaluation.systems import hypervolumes, summary_table
from emorl.runs.results import (
    BASE,
    BEST,
    DistillationResult,
    DynamicResult,
    DynamicSystem,
    EvaluationResult,
    FixedPoint,
    FusionResult,
    Interval,
    Kind,
    MethodsResult,
    Point,
    Retention,
    SearchResult,
    Spread,
    System,
    TradeOff,
    TrainingResult,
    as_json,
    write_result,
)
from emorl.runs.run import Cost, open_run, write_json, write_text
from emorl.search.study import Finished
from emorl.search.trials import trials_table

OBJECTIVES = ("reflection", "empathy", "fluency")
HOSTILE = "<script>alert('completion')</script> [bold]& :smile:"
"""the base's answer to the first prompt"""


def write_run(output: Path, objectives: Sequence[str] = OBJECTIVES, prompts: int = 6, steps: int = 4) -> Path:
    """Writes train, search and evaluate; the policy of the first objective has collapsed, the front has several points."""
    functions = {name: {"function": "length", "options": {"minimum": 1, "maximum": 9}} for name in objectives}
    content = {"output": str(output), "base": {"model": "base"}, "data": {"path": "prompts.csv"}, "objectives": functions}
    experiment = parse(Experiment, content, "synthetic")
    write_text(output / "experiment.yaml", to_yaml(experiment))
    for number, name in enumerate(objectives):
        _write_training(output / "train" / name, name, collapsed=number == 0)
    best, front_weights = _write_search(experiment, steps)
    _write_evaluation(experiment, best, front_weights, prompts)
    return output


def score_of(weights: Sequence[float]) -> list[float]:
    """Concave in the share of the objective's own policy: mixing costs little at first."""
    return [0.2 + 0.6 * math.sqrt(weight / sum(weights)) for weight in weights]


def _write_training(path: Path, name: str, *, collapsed: bool) -> None:
    shares = [1.0, 0.9, 0.5, 0.25] if collapsed else [1.0, 1.0, 0.9, 0.95]
    log = [
        {"step": 8 * index, "eval_reward": 0.2 + 0.15 * index, "eval_distinct_share": share, "eval_distinct_2": 0.8,
         "eval_words": 9.0}
        for index, share in enumerate(shares)
    ]  # fmt: skip
    result = TrainingResult(
        objective=name,
        reward_weights={name: 1.0},
        prompts_per_step=8,
        scores={name: 0.65},
        kl=0.1,
        scale="[0, 1]",
        scores_outside_range=0,
        steps=24,
        best_step=24,
        stopped="max_steps reached",
        base_reward=0.2,
        reward=0.65,
        base_distinct_share=1.0,
        distinct_share=shares[-1],
        words=9.0,
        collapsed=collapsed,
        log=[{"step": 1, "loss": 0.1}, *log],
    )
    write_result(path, result)
    open_run(path, "train", {}).add_cost(Cost(100, 400, 8000, 400, 60.5)).finish()


def _write_search(experiment: Experiment, steps: int) -> tuple[dict[str, float], list[dict[str, float]]]:
    """All mixtures in `steps` parts, 400 of them where there would be more; returns the weights of the best and of every point
    of the front."""
    objectives, path = list(experiment.objectives), experiment.output / "search"
    noise = np.random.default_rng(0)
    if len(objectives) > 5:
        shares = noise.multinomial(steps, np.full(len(objectives), 1 / len(objectives)), size=400).tolist()
    else:
        shares = [point for point in product(range(steps + 1), repeat=len(objectives)) if sum(point) == steps]
    notes = {"errors": [0.02] * len(objectives), "cost": {"seconds": 1.0, "prompts": 32}}
    finished = [
        Finished(
            number,
            {name: share / steps for name, share in zip(objectives, point, strict=True)},
            tuple(score + noise.normal(0, 0.01) for score in score_of(point)),
            notes,
        )
        for number, point in enumerate(shares)
    ]
    table = trials_table(finished, objectives, [float(np.mean(trial.scores)) for trial in finished])
    table = table.rename(columns={name: f"weight_{name}" for name in objectives})
    path.mkdir(parents=True)
    table.to_csv(path / "trials.csv", index=False)
    points = [
        Point(
            {name: row[f"weight_{name}"] for name in objectives},
            {name: row[f"score_{name}"] for name in objectives},
            row["value"],
        )
        for row in table[table["front"]].to_dict("records")
    ]
    best = max(points, key=lambda point: point.value)
    write_result(path, SearchResult("hierarchical_grid", "mean", {}, len(finished), None, best, points))
    open_run(path, "search", {}).add_cost(Cost(32, 480, 9600, 1440, 30.25)).finish()
    return dict(best.weights), [dict(point.weights) for point in points]


def _write_evaluation(
    experiment: Experiment, best: dict[str, float], front_weights: Sequence[dict[str, float]], prompts: int
) -> None:
    objectives, path = list(experiment.objectives), experiment.output / "evaluate"
    equal = {name: 1 / len(objectives) for name in objectives}
    systems = [
        System(BASE, Kind.BASE, {}),
        *(System(f"policy {name}", Kind.POLICY, {other: float(other == name) for other in objectives}) for name in objectives),
        System("ensemble, equal weights", Kind.ENSEMBLE, equal),
        System(BEST, Kind.ENSEMBLE, best),
        System("parameter average, equal weights", Kind.PARAMETER_AVERAGE, equal),
        *(
            System(f"front {number}", Kind.FRONT, weights)
            for number, weights in enumerate(front_weights[:: max(1, len(front_weights) // 6)], 1)
        ),
    ]
    tables = {system.name: _completions(system, objectives, prompts) for system in systems}
    completions = pd.concat([table.assign(system=name) for name, table in tables.items()], ignore_index=True)
    path.mkdir(parents=True)
    completions.to_parquet(path / "completions.parquet", index=False)
    summary = summary_table(systems, tables, objectives, experiment.train.collapse.share)
    summary.to_csv(path / "summary.csv", index=False)
    write_result(path, EvaluationResult(objectives, systems, *hypervolumes(summary, objectives)))
    write_json(path / "hacking.json", as_json(_attacks(completions, objectives, prompts)))
    config = as_mapping(experiment)
    open_run(path, "evaluate", config).add_cost(Cost(64, 256, 5120, 768, 12.5)).finish()


def _attacks(completions: pd.DataFrame, objectives: Sequence[str], prompts: int) -> Attacks:
    """The first objective is hacked by one sentence and prefers long answers, the others by nothing."""
    none = math.nan
    honest = Honest(0.15, 0.25, 0.4, 0.45, none, none)
    checks = [
        ObjectiveCheck(
            name, prompts, 900, honest, honest.bar,
            (
                Attack("empty", 0.0, 0.0, "refused", ""),
                Attack("prompt repeated", 0.2, 0.04, "close", "Nobody at work"),
                Attack("words shuffled", none, none, "unscored", "you feel"),
                Attack("best fixed response", 0.9 if number == 0 else 0.1, 0.01, "hacked" if number == 0 else "refused",
                       "<b>You feel that you feel.</b>"),
            ),
            Correlation(0.75, 0.5, 0.9) if number == 0 else Correlation(none, none, none),
            Correlation(0.1, -0.2, 0.4),
        )
        for number, name in enumerate(objectives)
    ]  # fmt: skip
    systems = {str(name): sameness(list(texts)) for name, texts in completions.groupby("system")["completion"]}
    return Attacks(None, checks, systems)


def _completions(system: System, objectives: Sequence[str], prompts: int) -> pd.DataFrame:
    """Scores vary by prompt alone, and so differ between systems by the same amount for every prompt but the first."""
    weights = [system.weights.get(name, 0.0) for name in objectives]
    scores = score_of(weights) if any(weights) else [0.15] * len(objectives)
    if system.kind == Kind.PARAMETER_AVERAGE:
        scores = [score - 0.08 for score in scores]
    collapsed = system.name == f"policy {objectives[0]}"
    rows = []
    for index in range(prompts):
        hostile = system.kind == Kind.BASE and index == 0
        answer = "You feel that you feel." if collapsed else f"You sound tired of waiting, {system.name} {index}."
        shift = 0.1 * (index % 3) + (0.03 if index == 0 and system.kind == Kind.POLICY else 0.0)
        rows.append(
            {
                "prompt_index": index,
                "sample": 0,
                "prompt": f"Nobody at work ever asks me what I want, number {index}.",
                "completion": HOSTILE if hostile else answer,
                "tokens": 8,
                **{name: score + shift for name, score in zip(objectives, scores, strict=True)},
            }
        )
    return pd.DataFrame(rows)


def _write_methods(output: Path) -> None:
    columns = [*OBJECTIVES, "mean", "minimum", "hypervolume", "points", "diversity_2", "edit_rate", "distinct_share", "words",
               "prompts", "converged_prompts", "all_prompts", "completions", "tokens", "seconds", "search_seconds",
               "decode_cost"]  # fmt: skip
    rows = {name: dict.fromkeys(columns, Spread(0.25, None)) for name in ("ensemble", "<b>gdpo")}
    gap = Interval(0.125, -0.1, 0.3, 0.9)
    gaps = {"<b>gdpo": {"mean": gap, "hypervolume": gap}}
    best = {"mean": "<b>gdpo", "hypervolume": None}
    write_result(output / "compare", MethodsResult(OBJECTIVES, [0], 6, "ensemble", rows, gaps, best, {"reflection": 0.0}))
    write_json(output / "seed-0" / "gdpo" / "train" / "gdpo" / "cost.json", {"prompts": 5})
    write_json(output / "seed-0" / "ensemble" / "search" / "cost.json", {"prompts": 6})
    for name in ("seeds", "points"):
        pd.DataFrame({"method": list(rows), "seed": 0}).to_csv(output / "compare" / f"{name}.csv", index=False)


def _write_fusion(output: Path) -> None:
    """A search over layers with two candidates."""
    scores = dict.fromkeys(OBJECTIVES, 0.5)
    layers = {"layers.0": "slerp", "layers.1": "<b>empathy"}
    fused = FusionResult(layers=layers, proposer="coordinate_descent", trials=2, scores=scores, value=0.5, test=scores)
    write_result(output / "fuse", fused)
    write_json(output / "fuse" / "cost.json", {"prompts": 7})
    candidates = {"trial": [0, 1], "plan": ["2 x slerp", "slerp, empathy"], "step_00": [3, 3], "score_empathy": [0.4, 0.6]}
    table = pd.DataFrame({**candidates, "error_empathy": 0.1, "value": [0.4, 0.5]})
    table.to_csv(output / "fuse" / "trials.csv", index=False)


def _write_dynamic(output: Path) -> None:
    system = DynamicSystem("RLAE-PPO", 8, 0.5, 0.1, 0.2, 0.1, 0.3)
    fixed = FixedPoint({"reflection": 1.0}, 0.5)
    write_result(output / "dynamic" / "comparison", DynamicResult([system], "ppo", fixed, OBJECTIVES, 6, 3, "cpu", 1))


def _write_distillation(output: Path) -> None:
    """One trade-off; the value differs, one score does not."""
    figures = {"ensemble": 0.5, "soup": 0.25, "distilled": 0.45}
    scores = {system: dict.fromkeys(OBJECTIVES, value) for system, value in figures.items()}
    one = TradeOff("<b>best found", {"reflection": 1.0}, False, scores, figures, figures, figures, figures)
    kept = {"value": Retention(0.25, 0.2, 0.3, 0.8, 0.7, 0.9), "score empathy": Retention(0.01, -0.1, 0.1, None, None, None)}
    write_result(output / "distill", DistillationResult(False, "soup", 0.99, 3, 2, 4, 0.2, 0.1, [one], kept))
    write_json(output / "distill" / "cost.json", {"prompts": 8})


OTHERS = {"compare": _write_methods, "fuse": _write_fusion, "dynamic": _write_dynamic, "distill": _write_distillation}
"""stages beside those of `write_run`, each written into an output"""
