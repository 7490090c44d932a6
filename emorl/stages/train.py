"""Train stage: one policy for each objective, or one for all (`emorl train experiment.yaml --objective NAME`).

Each policy has a run directory of its own, `train/NAME`, with its adapter in `policy/`. Departures from EMORL (arXiv
2505.02579), whose KL term has no effect: TRL's GRPO or our SCST with `beta` > 0, and the KL it leads to is measured at every
validation; validation decodes as the policy will be used (the experiment's `generation`), and the best checkpoint that has not
collapsed is kept instead of the last. Under `accelerate launch` or `torchrun` every process performs this stage.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from emorl.config import UserError, nearest
from emorl.config.experiment import Experiment
from emorl.runs.console import Console
from emorl.runs.layout import CHECKPOINTS, POLICY, Layout
from emorl.runs.progress import Progress, Silent
from emorl.runs.results import TrainingResult, as_json, read_result
from emorl.runs.run import Run
from emorl.stages.materials import Materials
from emorl.stages.options import add_experiment, load
from emorl.stages.stage import Stage, is_main_process, perform

BASE_KEYS = ("base", "-base.device_map", "-base.offload_folder", "-base.trust_remote_code")
"""keys of an experiment that say which base it has, not where it lies"""

TRAINING = (*BASE_KEYS, "data", "generation", "seed", "train")
"""keys of an experiment that its policies depend on, beside their objectives"""


def policy_stage(experiment: Experiment, name: str, turn: tuple[int, int] = (1, 1)) -> Stage[TrainingResult]:
    """The stage of one policy; `turn` says which one it is of how many that the command trains."""
    objectives = [name] if experiment.train.mode == "ensemble" else list(experiment.objectives)
    return Stage(
        name=f"train/{name}",
        result=TrainingResult,
        check=lambda experiment: check(experiment, [name]),
        depends_on=(*TRAINING, *(f"objectives.{objective}" for objective in objectives)),
        work=lambda materials, run, progress: work(materials, run, progress, name, turn),
        leaves=[POLICY],
    )


def check(experiment: Experiment, names: Sequence[str] | None = None) -> None:
    """Refuses a policy that is none, and settings that TRL, PEFT or transformers would refuse.

    Args:
        names: of the policies that will be trained; all by default.
    """
    _check_names(experiment, names or ())
    from emorl.objectives.loading import check_objectives

    check_objectives(experiment.objectives)
    from emorl.policies.generation import check_generation

    check_generation(experiment.generation)
    if experiment.policies is not None:
        return
    from emorl.training.lora import lora_config
    from emorl.training.modes import plan_of
    from emorl.training.rehearsal import rehearse
    from emorl.training.trainers import trainer_config, training_block

    lora_config(experiment.train, experiment.base)
    block, _ = training_block(experiment.train, experiment.base)
    for name in names or experiment.policy_names:
        plan = plan_of(experiment.train, list(experiment.objectives), name)
        train, base, generation = experiment.train, experiment.base, experiment.generation
        rehearse(trainer_config(plan, train, base, generation, experiment.seed, Path(CHECKPOINTS)), block)


def _check_names(experiment: Experiment, names: Sequence[str]) -> None:
    for name in names:
        if name not in experiment.policy_names:
            kind = "objective" if experiment.train.mode == "ensemble" else "policy"
            raise UserError(f"no {kind} {name!r} in this experiment; {nearest(name, experiment.policy_names)}")


def work(materials: Materials, run: Run, progress: Progress, name: str, turn: tuple[int, int]) -> TrainingResult:
    """Trains a policy from its last complete checkpoint to its end."""
    from emorl.objectives.loading import outside_range
    from emorl.training.lora import leaves_out_experts, lora_config
    from emorl.training.modes import plan_of
    from emorl.training.policy import train_policy
    from emorl.training.trainers import build_trainer, trainer_config

    experiment = materials.experiment
    plan = plan_of(experiment.train, list(experiment.objectives), name)
    config = trainer_config(
        plan, experiment.train, experiment.base, experiment.generation, experiment.seed, run.path / CHECKPOINTS
    )
    lora = lora_config(experiment.train, experiment.base)
    if leaves_out_experts(experiment.train, experiment.base):
        progress.say(
            f"policy {name}: adapts all linear layers but those in the base's blocks of experts, which cannot be combined"
        )
    trainer = build_trainer(
        plan,
        experiment.train,
        config,
        lora,
        base=materials.own_base(),
        splits=materials.splits,
        objectives=[materials.objective(objective) for objective in plan.objectives],
        generation=experiment.generation,
        run=run,
    )
    result = train_policy(trainer, plan, run.path / CHECKPOINTS, run.path / POLICY, progress, turn)
    for line in outside_range(trainer.validation.objectives):
        progress.warn(line)
    return result


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
    waiting = [name for name in names if not layout.is_ours(name)]
    for name in names:
        if experiment.policies is None:
            turn = (waiting.index(name) + 1, len(waiting)) if name in waiting else (1, 1)
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
