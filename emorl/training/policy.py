"""Train stage: one policy by GRPO or SCST (`emorl train experiment.yaml --objective NAME`); training/modes.py says for what.

Departures from EMORL (arXiv 2505.02579), whose KL term has no effect: TRL's GRPO or our SCST with `beta` > 0, and the KL it
leads to is measured at every validation; validation decodes as the policy will be used (the experiment's `generation`), and
the best checkpoint that has not collapsed is kept instead of the last.
"""

import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import LoraConfig, PeftModel

from emorl.config.experiment import Experiment
from emorl.config.yaml import as_mapping
from emorl.evaluation.scoring import check_generation
from emorl.objectives.loading import check_objectives, outside_range
from emorl.runs.layout import POLICY_DIRECTORY, policy_directories, training_settings
from emorl.runs.progress import Progress, Silent
from emorl.runs.run import Run, only_process, open_run, write_json
from emorl.training.callbacks import CollapseCallback, CostCallback, ProgressCallback
from emorl.training.checkpoints import last_complete_checkpoint
from emorl.training.dynaopt import SCORE
from emorl.training.modes import PolicyPlan, plan_of
from emorl.training.trainers import (
    BETA,
    CHECKPOINTS,
    PolicyTrainer,
    TrainerConfig,
    build_trainer,
    lora_config,
    prompts_per_step,
    trainer_config,
)


def train(experiment: Experiment, name: str, progress: Progress | None = None) -> Path:
    """Trains one policy, named by its objective or by `train.mode`; returns its run directory, with the adapter in `policy/`.

    Skips a finished run and continues an interrupted one from its last complete checkpoint. Under `accelerate launch` or
    `torchrun` every process calls this.

    Raises:
        UserError: an unknown policy or setting, or a run directory that holds another run.
    """
    if progress is None or not PartialState().is_main_process:
        progress = Silent()
    plan = plan_of(experiment, name)
    check_objectives(plan.objectives)
    check_generation(experiment.generation)
    path = experiment.training_of(name)
    if experiment.policies is not None:
        policy_directories(experiment)
        progress.say(f"policy {name}: of {path}")
        return path
    config, lora = trainer_config(experiment, plan), lora_config(experiment)
    if not PartialState().is_main_process:
        return _train_as(experiment, plan, config, lora, None, progress)
    with only_process(path):
        return _train_as(experiment, plan, config, lora, open_run(path, "train", _identity(experiment, plan)), progress)


def _identity(experiment: Experiment, plan: PolicyPlan) -> dict[str, Any]:
    objectives = as_mapping(experiment)["objectives"]
    return {**training_settings(experiment), "objective": {name: objectives[name] for name in plan.objectives}}


def _train_as(
    experiment: Experiment,
    plan: PolicyPlan,
    config: TrainerConfig,
    lora: LoraConfig | None,
    run: Run | None,
    progress: Progress,
) -> Path:
    """Trains in this process; `run` is None in all processes but the main one."""
    name, path = plan.name, experiment.training_of(plan.name)
    finished = [run.finished if run else False]
    broadcast_object_list(finished)
    if finished[0]:
        progress.say(f"policy {name}: trained before, in {path}")
        return path
    algorithm = type(config).__name__.removesuffix("Config")
    progress.say(f"policy {name}: training with {algorithm}, at most {config.max_steps} steps")
    if config.beta == 0:
        progress.warn(f"train.{algorithm.lower()}.beta is 0: nothing holds policy {name} near the base (default {BETA})")
    cost = CostCallback(run)
    trainer = build_trainer(experiment, plan, config, lora, cost)
    checkpoint = last_complete_checkpoint(path / CHECKPOINTS)
    trainer.args.eval_on_start = checkpoint is None  # the log of a resumed run has that validation already
    with progress.bar(f"train {name}", config.max_steps) as bar:
        trainer.add_callback(ProgressCallback(bar, log=trainer.validation.objectives[0].scale.log))
        trainer.train(resume_from_checkpoint=checkpoint)
    report = _outcome(trainer, plan, config)
    if run is not None:
        _save_policy(trainer, path / POLICY_DIRECTORY, plan)
        write_json(path / "result.json", report)
        cost.flush()
        run.finish()
    for line in outside_range(trainer.validation.objectives):
        progress.warn(line)
    if report["collapsed"]:
        progress.warn(
            f"policy {name} has collapsed: distinct completions {report['distinct_share']:.2f}, "
            f"base {report['base_distinct_share']:.2f}; raise beta or lower learning_rate"
        )
    PartialState().wait_for_everyone()
    return path


def _outcome(trainer: PolicyTrainer, plan: PolicyPlan, config: TrainerConfig) -> dict[str, Any]:
    """How training ended, from the logged validations. Rewards and scores are means on the validation prompts, `kl` is the
    kept policy's KL to the base in nats per token of its validation answers; in `log`, the trainer's own `reward` is what it
    maximised. Scores outside the range are those of this process since its start."""
    validations = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    best_step = trainer.state.best_global_step or trainer.state.global_step
    best = next((entry for entry in reversed(validations) if entry["step"] == best_step), validations[-1])
    first = validations[0]
    collapse = next(c for c in trainer.callback_handler.callbacks if isinstance(c, CollapseCallback))
    objectives = trainer.validation.objectives
    return {
        "objective": plan.name,
        "reward_weights": dict(zip(plan.objectives, plan.reward_weights, strict=True)),
        "steps": trainer.state.global_step,
        "best_step": best_step,
        "stopped": next(
            (c.reason for c in trainer.callback_handler.callbacks if getattr(c, "reason", "")), "max_steps reached"
        ),
        "prompts_per_step": prompts_per_step(config),
        "base_reward": first["eval_reward"],
        "reward": best["eval_reward"],
        "scores": {name: best[key] for name in plan.objectives if (key := f"eval_{SCORE}{name}") in best},
        "kl": best.get("eval_kl"),  # a run of an earlier version may be resumed
        "scale": "; ".join(str(objective.scale) for objective in objectives),
        "scores_outside_range": sum(objective.outside for objective in objectives),
        "base_distinct_share": first["eval_distinct_share"],
        "distinct_share": best["eval_distinct_share"],
        "words": best["eval_words"],
        "collapsed": collapse.is_collapsed(best["eval_distinct_share"], first["eval_distinct_share"]),
        "log": trainer.state.log_history,
    }


def _save_policy(trainer: PolicyTrainer, directory: Path, plan: PolicyPlan) -> None:
    """Adapter (or the whole model, where all of it was tuned), tokenizer and `policy.json`, whole or not at all."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    tokenizer: Any = trainer.processing_class
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)  # a policy without a finished run is from a kill in the next lines
    model.save_pretrained(partial, safe_serialization=True)
    tokenizer.save_pretrained(partial)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    described = {"objective": plan.name, "base": base.name_or_path, "base_fingerprint": trainer.base_fingerprint}
    write_json(partial / "policy.json", described)
    partial.rename(directory)
