"""Fusion stage: the trained policies become one policy (`emorl fuse experiment.yaml`), with given settings or searched ones.

Searched are settings for the whole model (RL-Fusion's Q-learning, Appl. Sci. 2025, 15(4), 2186, or Optuna's samplers), or what
counts in each layer (RMM's PPO, arXiv 2503.21272, or coordinate descent). Candidates are fused in memory, into the loaded base,
and only where they differ from the last one; every one answers the same validation prompts. The search's best score is a
maximum over noisy estimates: judge the policy on other prompts.
"""

import importlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from emorl.config import UserError, nearest
from emorl.config.experiment import Experiment
from emorl.data import Splits, load_prompts
from emorl.evaluation.memo import ScoreMemo
from emorl.evaluation.scoring import check_generation, cost_of, generate, mean_and_error, score
from emorl.fusion.adapters import fuse_adapters
from emorl.fusion.loaded import LoadedFusion, loaded_adapters
from emorl.fusion.operators import Fusion, check_fusion
from emorl.objectives.loading import check_objectives, load_objective
from emorl.objectives.scalarize import importance_of
from emorl.policies.adapters import Adapter, read_adapter
from emorl.policies.base import Base, load_base, load_tokenizer, read_policies
from emorl.policies.prompts import is_chat
from emorl.runs.layout import POLICY_DIRECTORY, policy_directories
from emorl.runs.progress import Progress, Silent
from emorl.runs.run import open_run, write_json, written_whole
from emorl.search.fusion_result import FUSE, finished_fusion, fusion_identity
from emorl.search.moving_set import MovingSet
from emorl.search.proposers.coordinate_descent import CoordinateDescent
from emorl.search.proposers.optuna_samplers import SAMPLERS, OptunaProposer
from emorl.search.proposers.q_learning import QLearning, QSettings
from emorl.search.proposers.settings_descent import SettingsDescent
from emorl.search.spaces.fusion_space import FusionSpace
from emorl.search.spaces.layer_space import LayerSpace
from emorl.search.study import Budget, Finished, Params, Proposer, Scored, Valuation, finished_trials, open_study
from emorl.search.study import search as run_search
from emorl.search.trials import total_cost, trials_table, valuation
from emorl.search.weight_search import check_mode

Q_LEARNING, SETTINGS_DESCENT = "q_learning", "settings_descent"
REINFORCED_MERGING, COORDINATE_DESCENT = "reinforced_merging", "coordinate_descent"
_OVER_LAYERS = (REINFORCED_MERGING, COORDINATE_DESCENT)

FusionOf = Callable[[str], Fusion]
"""A module's name -> what is done to it."""


def fuse_policies(experiment: Experiment, progress: Progress | None = None) -> Path:
    """Fuses the experiment's trained policies into one; returns the run directory, which holds the PEFT adapter `policy`
    and `result.json`.

    A finished fusion is skipped; a search that was interrupted continues.

    Raises:
        UserError: policies missing, an unknown method, setting or proposer, a run directory of another fusion.
    """
    progress = progress or Silent()
    if (finished := finished_fusion(experiment)) is not None:
        progress.say(f"fuse: finished before, in {finished}")
        return finished
    check_mode(experiment)
    directories = policy_directories(experiment)
    _check_proposer(experiment, len(directories))
    given = _given(experiment, list(directories))
    run = open_run(experiment.output / "fuse", FUSE, fusion_identity(experiment))
    adapters = [read_adapter(path, experiment.ensemble.adapter_scale) for path in directories.values()]
    modules = list(dict.fromkeys(name for adapter in adapters for name in adapter.factors))
    if experiment.fuse.proposer is None:
        result: dict[str, Any] = {"method": given.method, "weights": dict(zip(directories, given.weights, strict=True))}
        fusions = dict.fromkeys(modules, given)
    else:
        space = _space(experiment, list(directories), modules)
        trials, result, fusion_of = _searched(experiment, directories, space, run.path, progress)
        run = run.with_cost(total_cost(trials))
        fusions = {name: fusion_of(name) for name in modules}
    policy = run.path / POLICY_DIRECTORY
    shutil.rmtree(policy, ignore_errors=True)  # of a smaller search, or of one killed before its result was written
    _write(adapters, fusions, policy, experiment, _origin(result))
    write_json(run.path / "result.json", result)
    progress.say(f"fuse: the policies {', '.join(directories)} are one in {policy}")
    run.finish()
    return run.path


def _write(
    adapters: Sequence[Adapter], fusions: Mapping[str, Fusion], policy: Path, experiment: Experiment, origin: str
) -> None:
    first = next(iter(fusions.values()))
    differ = any(fusion != first for fusion in fusions.values())
    fuse_adapters(
        adapters,
        first,
        policy,
        rank=experiment.fuse.rank,
        energy=experiment.fuse.energy,
        seed=experiment.seed,
        by_module=fusions if differ else None,
        origin=origin,
    )


def _origin(result: Mapping[str, Any]) -> str:
    """For the policy's card: which search chose the settings, and what it is worth."""
    if "proposer" not in result:
        return ""
    scores = {where: ", ".join(f"{name} {score:.3f}" for name, score in result[where].items()) for where in ("scores", "test")}
    return (
        f"Chosen by {result['proposer']} among {result['trials']} candidates, for a value of {result['value']:.3f} on the "
        f"validation prompts ({scores['scores']}), too high as the best of many. On the test prompts, which the search did not "
        f"see: {scores['test']}."
    )


def _given(experiment: Experiment, names: Sequence[str]) -> Fusion:
    config = experiment.fuse
    unknown = sorted(set(config.weights) - set(names))
    if unknown:
        raise UserError(f"fuse.weights names {unknown[0]!r}; {nearest(unknown[0], names)}")
    weights = tuple(config.weights.get(name, 0.0) if config.weights else 1.0 / len(names) for name in names)
    fusion = Fusion(config.method, weights, config.settings)
    check_fusion(fusion, len(names), has_base=True)
    return fusion


def _check_proposer(experiment: Experiment, policies: int) -> None:
    config, proposers = experiment.fuse, [Q_LEARNING, SETTINGS_DESCENT, *_OVER_LAYERS, *SAMPLERS]
    if config.proposer is None:
        return
    if config.proposer not in proposers:
        raise UserError(f"fuse.proposer: no proposer is called {config.proposer!r}; {nearest(config.proposer, proposers)}")
    for method in config.methods:
        check_fusion(Fusion(method, (1.0,) * policies), policies, has_base=True)


def _space(experiment: Experiment, names: Sequence[str], modules: Sequence[str]) -> FusionSpace | LayerSpace:
    config = experiment.fuse
    if config.proposer in _OVER_LAYERS:
        return LayerSpace(tuple(names), tuple(config.methods), tuple(modules))
    return FusionSpace(tuple(names), tuple(config.methods), tuple(config.scales), config.step, config.settings)


def _searched(
    experiment: Experiment, adapters: Mapping[str, Path], space: FusionSpace | LayerSpace, path: Path, progress: Progress
) -> tuple[list[Finished], dict[str, Any], FusionOf]:
    config = experiment.fuse
    value = valuation(experiment, space.corners()[: len(adapters)])
    study = open_study(path / "journal.log", list(experiment.objectives), "fusion")
    known = finished_trials(study)
    progress.say(f"fuse: {config.proposer} over {', '.join(config.methods)} of {', '.join(adapters)}")
    if known:
        progress.say(f"fuse: continues behind {len(known)} candidates in {path}")
    with ScoreMemo(path / "scores.sqlite") as memo, progress.bar("search fusion", config.trials, done=len(known)) as bar:
        evaluator = FusionEvaluator.load(experiment, adapters, space, memo)
        evaluator.remember(known)
        seen = len(known)

        def on_finished(finished: Sequence[Finished]) -> None:
            nonlocal seen
            bar.advance(len(finished) - seen, f"best {max(value(finished)):.3f}" if finished else "")
            seen = len(finished)

        finished = run_search(
            study,
            _proposer(experiment, space, value, evaluator.moving_set),
            evaluator,
            space.distributions,
            budget=Budget(trials=config.trials),
            on_finished=on_finished,
        )
        values = value(finished)
        best, trial = max(zip(values, finished, strict=True), key=lambda pair: pair[0])
        result = {
            **space.describe(trial.params),
            "proposer": config.proposer,
            "prompts": "validation",
            "scores": dict(zip(experiment.objectives, trial.scores, strict=True)),
            "value": best,
            "trials": len(finished),
            "budget": config.trials,
        }
        fusion_of = space.fusion_of(trial.params)
        result["test"] = evaluator.test_scores(fusion_of)
        if evaluator.moving_set is not None:
            result["holdout"], result["holdout_errors"] = evaluator.holdout_scores(fusion_of)
    table = trials_table(finished, list(experiment.objectives), values)
    if isinstance(space, LayerSpace):
        table.insert(1, "plan", [space.in_words(trial.params) for trial in finished])
    with written_whole(path / "trials.csv") as temporary:
        table.to_csv(temporary, index=False)
    return finished, result, fusion_of


def _proposer(
    experiment: Experiment, space: FusionSpace | LayerSpace, value: Valuation, moving_set: MovingSet | None
) -> Proposer:
    config = experiment.fuse
    assert config.proposer is not None
    if isinstance(space, LayerSpace):
        if config.proposer == COORDINATE_DESCENT:
            return CoordinateDescent(space.merging, value)
        try:
            merging = importlib.import_module("emorl.search.proposers.reinforced_merging")  # needs the extra `rl`
        except ModuleNotFoundError as error:
            raise UserError(f"reinforced_merging needs {error.name}: pip install 'emorl[rl]'") from None
        return merging.ReinforcedMerging(space.merging, value, experiment.seed, merging.PPOSettings(episodes=config.trials))
    if config.proposer == SETTINGS_DESCENT:
        return SettingsDescent(space, value)
    if config.proposer == Q_LEARNING:
        q = config.q_learning
        settings = QSettings(q.alpha, q.gamma, (q.epsilon_start, q.epsilon_end), q.exploration, q.learning_rate)
        importance = importance_of(list(experiment.objectives), experiment.value.preferences)
        gain = None if moving_set is None else moving_set.gain(importance)
        return QLearning(space, value, config.trials, experiment.seed, settings, gain)
    return OptunaProposer(config.proposer, space, len(experiment.objectives), value, experiment.seed)


class FusionEvaluator:
    """Some candidates -> their scores on the validation prompts, or on those of `moving_set`; notes hold the standard errors
    and the cost."""

    def __init__(
        self,
        loaded: LoadedFusion,
        base: Base,
        experiment: Experiment,
        space: FusionSpace | LayerSpace,
        splits: Splits,
        memo: ScoreMemo,
    ) -> None:
        self._loaded, self._base, self._experiment, self._space = loaded, base, experiment, space
        self._data, self._test, self._memo = splits.validation, splits.test, memo
        self._objectives = [load_objective(name, config) for name, config in experiment.objectives.items()]
        self._generation = {**experiment.generation, **experiment.search.generation}
        strata = experiment.fuse.strata
        self.moving_set = None if strata is None else MovingSet(splits.validation, strata, experiment.seed)

    @classmethod
    def load(
        cls, experiment: Experiment, adapters: Mapping[str, Path], space: FusionSpace | LayerSpace, memo: ScoreMemo
    ) -> "FusionEvaluator":
        """Loads prompts, objectives, base and policies."""
        check_generation({**experiment.generation, **experiment.search.generation})
        check_objectives(experiment.objectives)
        splits = load_prompts(experiment.data, experiment.seed, is_chat(load_tokenizer(experiment.base.model)))
        base = load_base(experiment.base)
        policies = read_policies(adapters, base, experiment.ensemble.adapter_scale)
        loaded = loaded_adapters(base.model, list(policies.values()), experiment.seed)
        return cls(loaded, base, experiment, space, splits, memo)

    def remember(self, finished: Sequence[Finished]) -> None:
        """Takes in the trials of earlier runs."""
        if self.moving_set is not None:
            self.moving_set.remember(finished)

    def __call__(self, candidates: Sequence[Params]) -> list[Scored]:
        return [self._scored(candidate) for candidate in candidates]

    def _scored(self, candidate: Params) -> Scored:
        start, names = time.perf_counter(), self._names
        rows = list(range(len(self._data))) if self.moving_set is None else self.moving_set.items
        table = self._answered(self._space.fusion_of(candidate), rows)
        by_item = table.groupby("prompt_index")[names].mean().to_numpy()  # (n, O)
        for name, known in zip(names, (~np.isnan(by_item)).any(0), strict=True):
            if not known:
                raise UserError(f"objective {name!r} returned None for every prompt; a search needs scores")
        notes: dict[str, Any] = {"cost": asdict(cost_of(table, len(names), time.perf_counter() - start))}
        if self.moving_set is None:
            means, errors = mean_and_error(table, names)
        else:
            found, noted = self.moving_set.record(by_item)
            means, errors, notes = found.score.tolist(), found.error.tolist(), {**notes, **noted}
        return Scored(tuple(means), {"errors": errors, **notes})

    def holdout_scores(self, fusion_of: FusionOf) -> tuple[dict[str, float], dict[str, float]]:
        """Objective -> score on the prompts that no candidate answered, and its standard error."""
        assert self.moving_set is not None
        by_item = self._answered(fusion_of, self.moving_set.holdout).groupby("prompt_index")[self._names].mean().to_numpy()
        found = self.moving_set.on_holdout(by_item)
        scores, errors = (dict(zip(self._names, values.tolist(), strict=True)) for values in (found.score, found.error))
        return scores, errors

    def test_scores(self, fusion_of: FusionOf) -> dict[str, float]:
        """Objective -> score on the test prompts, which neither training nor search saw."""
        means, _ = mean_and_error(self._answered(fusion_of, range(len(self._test)), self._test), self._names)
        return dict(zip(self._names, means, strict=True))

    @property
    def _names(self) -> list[str]:
        return [objective.name for objective in self._objectives]

    def _answered(self, fusion_of: FusionOf, rows: Sequence[int], test: Dataset | None = None) -> pd.DataFrame:
        """Scored completions of some rows of the validation data, or of the test data."""
        data = self._data if test is None else test
        self._loaded.apply(lambda name: fusion_of(name.removesuffix(".weight")))
        prompts = list(data["prompt"])
        completions = generate(
            self._loaded.model,
            self._base.tokenizer,
            [prompts[row] for row in rows],
            self._generation,
            samples=self._experiment.search.samples,
            seed=self._experiment.seed,
        )
        completions["prompt_index"] = completions["prompt_index"].map(dict(enumerate(rows)))
        return score(completions, data, self._objectives, self._memo if test is None else None)
