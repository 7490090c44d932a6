"""Fuse stage: the trained policies become one policy (`emorl fuse experiment.yaml`), with given settings or searched ones; or
whole checkpoints become one, tensor by tensor on disk (`emorl fuse FILE`).

Searched are settings for the whole model (RL-Fusion's Q-learning, Appl. Sci. 2025, 15(4), 2186, or Optuna's samplers), or what
counts in each layer (RMM's PPO, arXiv 2503.21272, or coordinate descent). The search's best score is a maximum over noisy
estimates: judge the policy on other prompts. The run directory holds the PEFT adapter `policy` and `result.json`.
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emorl.config import UserError, nearest
from emorl.config.experiment import Experiment, load_experiment
from emorl.config.fuse import CheckpointsFile, is_experiment, load_checkpoints_file
from emorl.config.yaml import read_yaml
from emorl.runs.console import Console
from emorl.runs.layout import JOURNAL, POLICY, SCORES, TRIALS
from emorl.runs.progress import Progress
from emorl.runs.results import FusionResult, as_json
from emorl.runs.run import Run, written_whole
from emorl.stages.materials import Materials
from emorl.stages.options import add_keys, add_overrides
from emorl.stages.search import check_mode, generation_of
from emorl.stages.stage import Stage, perform
from emorl.stages.train import TRAINING

if TYPE_CHECKING:
    from emorl.fusion.operators import Fusion
    from emorl.policies.adapters import Adapter
    from emorl.search.fusion_evaluation import FusionEvaluator, FusionOf
    from emorl.search.proposers.fusions import Space
    from emorl.search.study import Finished, Valuation

_HELP = """\
An experiment's trained policies become one policy in OUTPUT/fuse/policy, by its block `fuse` (`emorl keys fuse`):
  emorl fuse experiment.yaml fuse.method=ties
  emorl fuse experiment.yaml --proposer q_learning              # RL-Fusion: settings searched on the validation prompts
Whole checkpoints are fused by a FILE of their own, for example
  output: runs/fused
  base: models/base
  models: {maths: models/maths, code: models/code}
  weights: {maths: 0.6, code: 0.4}
  method: ties
  settings: {density: 0.2}
A file of mergekit (linear, slerp, ties, task_arithmetic, dare_linear, dare_ties) is taken as it is, with --output FOLDER.
`emorl fuse --methods` says what each method does. """


def check(experiment: Experiment) -> None:
    """Refuses a method, setting or proposer that is none, before anything is loaded."""
    check_mode(experiment)
    from emorl.search.proposers.fusions import check_fusion_proposer

    names = experiment.policy_names
    check_fusion_proposer(experiment.fuse, len(names))
    _given(experiment, names)
    if experiment.fuse.proposer is not None:
        from emorl.objectives.loading import check_objectives

        check_objectives(experiment.objectives)
        from emorl.policies.generation import check_generation

        check_generation(generation_of(experiment))


def _given(experiment: Experiment, names: Sequence[str]) -> "Fusion":
    """The fusion that the block `fuse` says."""
    from emorl.fusion.operators import Fusion, check_fusion

    config = experiment.fuse
    unknown = sorted(set(config.weights) - set(names))
    if unknown:
        raise UserError(f"fuse.weights names {unknown[0]!r}; {nearest(unknown[0], names)}")
    weights = tuple(config.weights.get(name, 0.0) if config.weights else 1.0 / len(names) for name in names)
    fusion = Fusion(config.method, weights, config.settings)
    check_fusion(fusion, len(names), has_base=True)
    return fusion


def is_enough(experiment: Experiment, result: FusionResult) -> bool:
    """Whether no larger budget is left; a search may have ended with fewer trials than it was allowed."""
    return experiment.fuse.proposer is None or result.budget >= experiment.fuse.trials


def work(materials: Materials, run: Run, progress: Progress) -> FusionResult:
    """Searches, where a proposer is named, and writes the fused policy."""
    from emorl.policies.adapters import read_adapter

    experiment = materials.experiment
    folders = materials.layout.trained(experiment.policy_names)
    adapters = [read_adapter(folder, experiment.ensemble.adapter_scale) for folder in folders.values()]
    modules = list(dict.fromkeys(name for adapter in adapters for name in adapter.factors))
    if experiment.fuse.proposer is None:
        given = _given(experiment, list(folders))
        weights = dict(zip(folders, given.weights, strict=True))
        result, fusions = FusionResult(method=given.method, weights=weights), dict.fromkeys(modules, given)
    else:
        result, fusion_of = _searched(materials, modules, run, progress)
        fusions = {name: fusion_of(name) for name in modules}
    policy = run.path / POLICY
    shutil.rmtree(policy, ignore_errors=True)  # of a smaller search, or of one killed before its result was written
    _write(adapters, fusions, policy, experiment, _origin(result))
    progress.say(f"fuse: the policies {', '.join(folders)} are one in {policy}")
    return result


def _write(
    adapters: "Sequence[Adapter]", fusions: "Mapping[str, Fusion]", policy: Path, experiment: Experiment, origin: str
) -> None:
    from emorl.fusion.adapters import fuse_adapters

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


def _origin(result: FusionResult) -> str:
    """For the policy's card: which search chose the settings, and what it is worth."""
    if result.proposer is None:
        return ""
    on_validation, on_test = (
        ", ".join(f"{name} {score:.3f}" for name, score in scores.items()) for scores in (result.scores, result.test)
    )
    return (
        f"Chosen by {result.proposer} among {result.trials} candidates, for a value of {result.value:.3f} on the "
        f"validation prompts ({on_validation}), too high as the best of many. On the test prompts, which the search did not "
        f"see: {on_test}."
    )


def _searched(materials: Materials, modules: Sequence[str], run: Run, progress: Progress) -> "tuple[FusionResult, FusionOf]":
    """What a search found on the validation prompts, and what that does to each module."""
    from emorl.evaluation.memo import ScoreMemo
    from emorl.objectives.scalarize import Value
    from emorl.search.proposers.fusions import fusion_proposer, fusion_space
    from emorl.search.study import Budget, open_study
    from emorl.search.trials import best_trial, search_on, total_cost, valuation
    from emorl.search.weights import silence_optuna

    silence_optuna()
    experiment = materials.experiment
    config, names, objectives = experiment.fuse, experiment.policy_names, list(experiment.objectives)
    space, value = fusion_space(config, names, modules), Value.of(experiment.value, objectives)
    of_trials = valuation(value, space.corners()[: len(names)])
    study = open_study(run.path / JOURNAL, objectives, "fusion", run.config)
    progress.say(f"fuse: {config.proposer} over {', '.join(config.methods)} of {', '.join(names)}")
    with ScoreMemo(run.path / SCORES) as memo:
        evaluator = _evaluator(materials, space, memo)
        proposer = fusion_proposer(config, space, of_trials, value, evaluator.moving_set, experiment.seed)
        finished = search_on(
            study, proposer, evaluator, space, of_trials,
            title="fusion", expected=config.trials, progress=progress, budget=Budget(trials=config.trials),
        )  # fmt: skip
        best, trial = best_trial(finished, of_trials(finished))
        fusion_of = space.fusion_of(trial.params)
        holdout, errors = ({}, {}) if evaluator.moving_set is None else evaluator.holdout_scores(fusion_of)
        result = FusionResult(
            **space.describe(trial.params),
            proposer=config.proposer,
            scores=dict(zip(objectives, trial.scores, strict=True)),
            value=best,
            trials=len(finished),
            budget=config.trials,
            test=evaluator.test_scores(fusion_of),
            holdout=holdout,
            holdout_errors=errors,
        )
    _write_trials(run, space, finished, objectives, of_trials)
    run.with_cost(total_cost(finished))
    return result, fusion_of


def _evaluator(materials: Materials, space: "Space", memo: Any) -> "FusionEvaluator":
    from emorl.fusion.loaded import loaded_adapters
    from emorl.policies.base import read_policies
    from emorl.search.fusion_evaluation import FusionEvaluator
    from emorl.search.moving_set import MovingSet

    experiment, splits = materials.experiment, materials.splits
    strata, seed, base = experiment.fuse.strata, experiment.seed, materials.own_base()
    folders = materials.layout.trained(experiment.policy_names)
    policies = read_policies(folders, base, experiment.ensemble.adapter_scale)
    return FusionEvaluator(
        loaded_adapters(base.model, list(policies.values()), seed),
        base.tokenizer,
        space,
        splits,
        materials.objectives,
        generation=generation_of(experiment),
        samples=experiment.search.samples,
        seed=seed,
        moving_set=None if strata is None else MovingSet(splits.validation, strata, seed),
        memo=memo,
    )


def _write_trials(
    run: Run, space: "Space", finished: "Sequence[Finished]", objectives: Sequence[str], value: "Valuation"
) -> None:
    from emorl.search.spaces.layer_space import LayerSpace
    from emorl.search.trials import trials_table

    table = trials_table(finished, objectives, value(finished))
    if isinstance(space, LayerSpace):
        table.insert(1, "plan", [space.in_words(trial.params) for trial in finished])
    with written_whole(run.path / TRIALS) as temporary:
        table.to_csv(temporary, index=False)


_DEPENDS_ON = (
    *TRAINING, "objectives", "policies", "value", "ensemble", "search.samples", "search.generation", "fuse", "-fuse.trials",
)  # fmt: skip
STAGE = Stage("fuse", FusionResult, check, _DEPENDS_ON, work, is_enough, leaves=[POLICY])


def performed(experiment: Experiment, progress: Progress, materials: Materials) -> FusionResult:
    return perform(STAGE, experiment, progress, materials)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        metavar="FILE",
        help="experiment.yaml, or a YAML of checkpoints to fuse, ours or mergekit's",
    )
    add_overrides(parser)
    parser.add_argument("--output", metavar="FOLDER", help="of the fused model, the same as output=FOLDER")
    parser.add_argument("--proposer", metavar="NAME", help="search the fusion of policies, the same as fuse.proposer=NAME")
    parser.add_argument("--methods", action="store_true", help="print what each method does, with its settings, and end")
    add_keys(parser, CheckpointsFile, _HELP)


def command(options: argparse.Namespace) -> None:
    if options.methods:
        from emorl.fusion.operators import methods_markdown

        print(methods_markdown())
        return
    if options.file is None:
        raise UserError("no FILE given; give an experiment.yaml or a file of checkpoints (`emorl fuse --help` shows one)")
    output = [] if options.output is None else [f"output={options.output}"]
    overrides = [*options.overrides, *output]
    if sum(override.startswith("output=") for override in overrides) > 1:
        raise UserError("the output is given twice; give --output FOLDER or output=FOLDER")
    if is_experiment(read_yaml(options.file)):
        proposer = [] if options.proposer is None else [f"fuse.proposer={options.proposer}"]
        _fuse_policies(load_experiment(options.file, [*overrides, *proposer]), options.json)
        return
    if options.proposer is not None:
        raise UserError(f"--proposer searches the fusion of an experiment's policies; {options.file} is a file of checkpoints")
    file = load_checkpoints_file(options.file, overrides)
    from emorl.fusion.recipe import fuse

    folder = fuse(file, Console())
    if options.json:
        print(json.dumps({"model": str(folder)}))
    else:
        Console().say(f"fuse: {folder}")


def _fuse_policies(experiment: Experiment, in_json: bool) -> None:
    result = perform(STAGE, experiment, Console())
    if in_json:
        print(json.dumps({**as_json(result), "policy": str(experiment.output / "fuse" / POLICY)}, indent=2))
        return
    from emorl.reporting.fusion_lines import fusion_lines

    print("\n".join(fusion_lines(result)))
