"""What a trained method offers on the test prompts: its points, their scored completions on disk, and what they cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emorl.config.experiment import Experiment
from emorl.config.train import ConvergenceConfig
from emorl.runs.layout import TRIALS, Layout
from emorl.runs.progress import Progress
from emorl.runs.results import BASE, SearchResult, TrainingResult, read_result
from emorl.runs.run import Cost, read_cost, written_whole
from emorl.stages.materials import Materials
from emorl.stages.methods import COMBINED
from emorl.stages.samples import samples_folder

if TYPE_CHECKING:
    from emorl.evaluation.methods import OfferedPoint

EVALUATION_SEED = 10_000
"""added to the seed where decoding samples: training and search have drawn none of these"""


def points_of(experiment: Experiment, method: str) -> "list[OfferedPoint]":
    """The points that a method chose on the validation prompts, its best one first."""
    from emorl.evaluation.methods import ALONE, OfferedPoint
    from emorl.evaluation.pareto import chosen_points
    from emorl.evaluation.systems import table_file

    names, layout = list(experiment.objectives), Layout(experiment.output)
    if method == ALONE:
        chosen = {name: {other: float(other == name) for other in names} for name in _best_alone_first(experiment)}
    elif method in COMBINED:
        search = read_result(SearchResult, layout.search)
        best, front = search.best.weights, chosen_points(search.front, experiment.evaluate.front_points)
        others = {f"front {number}": point.weights for number, point in enumerate(front, 1) if point.weights != best}
        chosen = {"best found": best, **others}
    else:
        chosen = {method: {}}
    folder, samples = experiment.output / "test", experiment.evaluate.samples
    return [OfferedPoint(name, weights, folder / table_file(name, weights, samples)) for name, weights in chosen.items()]


def _best_alone_first(experiment: Experiment) -> list[str]:
    """Policies by their value in the ensemble's search, which evaluated each alone."""
    import numpy as np

    from emorl.evaluation.tables import read_table

    columns = [f"weight_{name}" for name in experiment.objectives]
    trials = read_table(Layout(experiment.output).search / TRIALS, columns, "`emorl search` writes it again")
    is_alone = {name: np.isclose(trials[f"weight_{name}"], 1.0) for name in experiment.objectives}
    return sorted(is_alone, key=lambda name: -float(trials.loc[is_alone[name], "value"].max()))


def score_points(
    materials: Materials, points: "Sequence[OfferedPoint]", data: Any, objectives: Sequence[Any], progress: Progress
) -> None:
    """Writes the table of every point that has none yet."""
    missing = [point for point in points if not point.table.exists()]
    if not missing:
        return
    from emorl.evaluation.systems import evaluate_weights

    experiment = materials.experiment
    model = materials.base.model if all(point.name == BASE for point in missing) else load_policy(materials)
    generation, config, seed = experiment.generation, experiment.evaluate, EVALUATION_SEED + experiment.seed
    with progress.bar(f"test {missing[0].table.parents[1].name}", len(missing)) as bar:
        for point in missing:
            tokenizer = materials.base.tokenizer
            evaluation = evaluate_weights(model, tokenizer, data, objectives, generation, config, point.weights, seed)
            with written_whole(point.table) as temporary:
                evaluation.table.to_parquet(temporary, index=False)
            bar.advance(1, point.name)


def load_policy(materials: Materials) -> Any:
    """What answers for a trained experiment: its mixture, or its one policy."""
    experiment = materials.experiment
    if experiment.train.mode == "ensemble":
        return materials.mixture()
    [name] = experiment.policy_names
    if experiment.train.tuning == "full":
        from emorl.policies.base import load_base

        [folder] = materials.layout.trained([name]).values()
        return load_base(replace(experiment.base, model=str(folder), tokenizer=None, revision=None)).model
    return materials.peft_policy(name)


def timed_models(materials: Mapping[str, Materials]) -> dict[str, Any]:
    """The bare base, one policy as PEFT runs it, and what answers for each method."""
    from emorl.evaluation.methods import ONE_POLICY

    first = next(iter(materials.values()))
    models = {BASE: first.base.model, **{method: load_policy(of_method) for method, of_method in materials.items()}}
    if first.experiment.train.mode == "ensemble":
        models[ONE_POLICY] = first.peft_policy(first.experiment.policy_names[0])
    return models


def consumption(experiment: Experiment, method: str, with_samples: bool = True) -> dict[str, float]:
    """What a method consumed: `prompts` as the paper counts them (training prompts drawn), then all of it with validation and
    search: completions, tokens, reward_calls, seconds. `converged_prompts` is where the paper's rule would have stopped, NaN
    where one of the policies never got there, or read pairs.

    Args:
        with_samples: of policies trained offline, count the samples that they share.
    """
    layout = Layout(experiment.output, experiment.policies)
    trained = [_training(experiment, layout, name) for name in experiment.policy_names]
    search = read_cost(layout.search) if method in COMBINED else Cost()
    shares = any(map(experiment.makes_pairs, experiment.policy_names)) and with_samples
    samples = read_cost(_samples_of(experiment)) if shares else Cost()
    total = sum((cost for cost, *_ in trained), search + samples)
    return {
        "prompts": sum(prompts for _, prompts, _ in trained) + samples.prompts,
        "converged_prompts": sum(converged for *_, converged in trained),
        "all_prompts": total.prompts,
        "completions": total.completions,
        "tokens": total.tokens,
        "reward_calls": total.reward_calls,
        "seconds": total.seconds,
        "search_seconds": search.seconds,
    }


def _samples_of(experiment: Experiment) -> Path:
    """Where the samples lie of which an experiment's policies, or those that it uses, were made."""
    if isinstance(experiment.policies, Path) and experiment.train.samples.reuse is None:
        return Layout(experiment.policies).samples
    return samples_folder(experiment)


def _training(experiment: Experiment, layout: Layout, name: str) -> tuple[Cost, int, float]:
    """Cost of a policy's training, prompts drawn, and prompts until it converged."""
    from emorl.training.callbacks import has_converged

    folder, rule = layout.training(name), experiment.train.convergence
    result = read_result(TrainingResult, folder)
    if result.pairs is not None:
        return read_cost(folder), 0, math.nan
    threshold = rule.threshold or ConvergenceConfig().threshold
    rewards = [validation.reward for validation in result.validations]
    reached = (
        validation.step
        for end, validation in enumerate(result.validations, 1)
        if has_converged(rewards[:end], rule.window, threshold)
    )
    per_step = result.prompts_per_step
    return read_cost(folder), result.steps * per_step, next(reached, math.nan) * per_step
