"""Train stage: one policy for each objective, or one for all (`emorl train experiment.yaml --objective NAME`).

Each policy has a run directory of its own, `train/NAME`, with its adapter in `policy/`. Departures from EMORL (arXiv
2505.02579), whose KL term has no effect: TRL's GRPO or our SCST with `beta` > 0, and the KL it leads to is measured at every
validation; TRL's DPO on pairs that people made or that are sampled once for all policies; validation decodes as the policy will
be used (the experiment's `generation`), and the best checkpoint that has not collapsed is kept instead of the last. Under
`accelerate launch` or `torchrun` every process performs this stage.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from emorl.config import UserError, nearest
from emorl.config.experiment import Experiment
from emorl.runs.console import Console
from emorl.runs.layout import CHECKPOINTS, KEPT, POLICY, ROUNDS, Layout
from emorl.runs.progress import Progress, Silent
from emorl.runs.results import TrainingResult, as_json, read_result
from emorl.runs.run import Run, read_cost
from emorl.stages import samples
from emorl.stages.materials import Materials
from emorl.stages.options import add_experiment, load
from emorl.stages.pairs import pairs_of, rounds_of
from emorl.stages.stage import BASE_KEYS, Stage, is_main_process, perform

if TYPE_CHECKING:
    from emorl.objectives.loading import Objective
    from emorl.training.modes import PolicyPlan

TRAINING = (*BASE_KEYS, "data", "generation", "seed", "train")
"""keys of an experiment that its policies depend on, beside their objectives"""


def policy_stage(experiment: Experiment, name: str, turn: tuple[int, int] = (1, 1)) -> Stage[TrainingResult]:
    """The stage of one policy; `turn` says which one it is of how many that the command trains."""
    return Stage(
        name=f"train/{name}",
        result=TrainingResult,
        check=lambda experiment: check(experiment, [name]),
        depends_on=_depends_on(experiment, name),
        work=lambda materials, run, progress: work(materials, run, progress, name, turn),
        leaves=[POLICY],
    )


def _depends_on(experiment: Experiment, name: str) -> list[str]:
    """What makes a policy this one: of the objectives its own, of the methods' blocks that of its method. A policy of people's
    pairs needs no function, and stays the same when its objective gets one."""
    if experiment.pairs_of(name) is not None:
        of_objective = [f"objectives.{name}.pairs"]
        others = ["grpo", "scst", "samples"]
    else:
        objectives = [name] if experiment.train.mode == "ensemble" else list(experiment.objectives)
        of_objective = [f"objectives.{objective}" for objective in objectives]
        of_objective += [f"-objectives.{objective}.{key}" for objective in objectives for key in ("method", "pairs")]
        others = ["grpo", "scst", "samples.reuse"] if experiment.method_of(name) == "dpo" else ["dpo", "samples"]
    return [*TRAINING, "-train.method", *(f"-train.{block}" for block in others), *of_objective]


def check(experiment: Experiment, names: Sequence[str] | None = None) -> None:
    """Refuses a policy that is none, and settings that TRL, PEFT or transformers would refuse.

    Args:
        names: of the policies that will be trained; all by default.
    """
    _check_names(experiment, names or ())
    from emorl.objectives.loading import check_objectives

    check_objectives({name: one for name, one in experiment.objectives.items() if one.pairs is None})
    from emorl.policies.generation import check_generation

    check_generation(experiment.generation)
    if experiment.policies is not None:
        return
    from emorl.training.lora import lora_config
    from emorl.training.pair_files import check_pairs
    from emorl.training.rehearsal import rehearse
    from emorl.training.trainers import trainer_config, training_block

    lora_config(experiment.train, experiment.base)
    for name in names or experiment.policy_names:
        if (pairs := experiment.pairs_of(name)) is not None:
            check_pairs(pairs)
        plan = _plan(experiment, name)
        train, base, generation = experiment.train, experiment.base, experiment.generation
        block, _ = training_block(train, plan.method)
        rehearse(trainer_config(plan, train, base, generation, experiment.seed, Path(CHECKPOINTS)), block)


def _plan(experiment: Experiment, name: str) -> "PolicyPlan":
    from emorl.training.modes import plan_of
    from emorl.training.trainers import training_method

    method = training_method(experiment.method_of(name), experiment.train, experiment.base)
    return plan_of(experiment.train, list(experiment.objectives), name, method)


def _check_names(experiment: Experiment, names: Sequence[str]) -> None:
    for name in names:
        if name not in experiment.policy_names:
            kind = "objective" if experiment.train.mode == "ensemble" else "policy"
            raise UserError(f"no {kind} {name!r} in this experiment; {nearest(name, experiment.policy_names)}")


def work(materials: Materials, run: Run, progress: Progress, name: str, turn: tuple[int, int]) -> TrainingResult:
    """Trains a policy from its last complete checkpoint to its end. A round goes on with the policy of the one before, and with
    pairs of that policy's answers."""
    from emorl.objectives.loading import outside_range

    plan = _plan(materials.experiment, name)
    objectives = [] if materials.experiment.pairs_of(name) else [materials.objective(one) for one in plan.objectives]
    start = None
    for number in range(1, rounds_of(materials.experiment, name)):
        folder = run.path / ROUNDS / str(number)
        if not (folder / POLICY).exists():
            _train(materials, run, progress, plan, objectives, turn, folder, start)
        start = folder / POLICY
    result = _train(materials, run, progress, plan, objectives, turn, run.path, start)
    for line in outside_range(objectives):
        progress.warn(line)
    return result


def _train(
    materials: Materials,
    run: Run,
    progress: Progress,
    plan: "PolicyPlan",
    objectives: "Sequence[Objective]",
    turn: tuple[int, int],
    folder: Path,
    start: Path | None,
) -> TrainingResult:
    """Trains a policy in a folder, the run's or a round's, beginning with the policy `start`."""
    from emorl.training.allocator import keep_freed_memory
    from emorl.training.lora import leaves_out_experts, lora_config
    from emorl.training.policy import train_policy
    from emorl.training.trainers import build_trainer, trainer_config

    experiment = materials.experiment
    train, base, generation = experiment.train, experiment.base, experiment.generation
    if leaves_out_experts(train, base):
        progress.say(
            f"policy {plan.name}: adapts all linear layers but those in the base's blocks of experts, which cannot be combined"
        )
    pairs = None
    if plan.method == "dpo":
        pairs, run = pairs_of(materials, run, progress, plan, objectives, folder, start)
    config = trainer_config(plan, train, base, generation, experiment.seed, folder / CHECKPOINTS)
    if config.use_cpu:
        keep_freed_memory()
    trainer = build_trainer(
        plan,
        train,
        config,
        lora_config(train, base),
        base=materials.own_base(),
        splits=materials.splits,
        objectives=objectives,
        generation=generation,
        run=replace(run, cost=read_cost(run.path)),
        pairs=pairs,
        start=start,
    )
    steps = trainer.args.max_steps
    keep = {max(1, round(share * steps)): run.path / KEPT / f"{100 * share:g}%" for share in train.keep if folder == run.path}
    return train_policy(trainer, plan, folder / CHECKPOINTS, folder / POLICY, progress, turn, keep)


def performed(
    experiment: Experiment, progress: Progress, materials: Materials, names: Sequence[str] | None = None
) -> dict[str, TrainingResult]:
    """Name -> result of each policy; those of another experiment (`policies`) are only read."""
    if experiment.policies is None:
        _check_names(experiment, names or ())  # their settings `perform` checks, of those that are not finished
    else:
        check(experiment, names)
    if not is_main_process():
        progress = Silent()
    results, layout = {}, Layout(experiment.output, experiment.policies)
    names = names or experiment.policy_names
    waiting, sampled = [name for name in names if not layout.is_ours(name)], False
    for name in names:
        if experiment.policies is None:
            turn = (waiting.index(name) + 1, len(waiting)) if name in waiting else (1, 1)
            if name in waiting and experiment.makes_pairs(name) and not sampled:
                check(experiment, [name])
                samples.performed(experiment, progress, materials)
                sampled = True
            results[name] = perform(policy_stage(experiment, name, turn), experiment, progress, materials)
            continue
        layout.trained([name])
        progress.say(f"policy {name}: {layout.policy(name)}")
        if layout.is_ours(name):
            results[name] = read_result(TrainingResult, layout.training(name))
    return results


def add_options(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser, "objectives", "seed", "generation", "train", "policies")
    parser.add_argument("--objective", action="append", metavar="NAME", help="train only this one's policy (repeatable)")


def command(options: argparse.Namespace) -> None:
    experiment = load(options)
    results = performed(experiment, Console(), Materials(experiment), options.objective)
    if not is_main_process():
        return
    if options.json:
        shown = {name: {k: v for k, v in as_json(result).items() if k != "log"} for name, result in results.items()}
        print(json.dumps(shown, indent=2))
        return
    from emorl.reporting.tables import print_training

    print_training(results)
