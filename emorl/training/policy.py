"""Training of one policy by GRPO, SCST or DPO from where it was interrupted to its kept checkpoint; modes.py says for what."""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftModel

from emorl.runs.layout import POLICY_CARD
from emorl.runs.progress import Progress
from emorl.runs.results import TrainingResult
from emorl.runs.run import write_json
from emorl.training.callbacks import CollapseCallback, CostCallback, KeepCallback, ProgressCallback
from emorl.training.checkpoints import last_complete_checkpoint
from emorl.training.dpo import DPOPolicyTrainer
from emorl.training.dynaopt import SCORE
from emorl.training.modes import PolicyPlan
from emorl.training.trainers import PolicyTrainer, TrainerConfig, default_beta, prompts_per_step
from emorl.training.validation import PAIR_ACCURACY


def train_policy(
    trainer: PolicyTrainer,
    plan: PolicyPlan,
    checkpoints: Path,
    policy: Path,
    progress: Progress,
    turn: tuple[int, int] = (1, 1),
    keep: Mapping[int, Path] | None = None,
) -> TrainingResult:
    """Trains, and writes what was kept to the folder `policy`; every process of a distributed run calls this.

    Args:
        checkpoints: folder from whose last complete one it goes on.
        keep: steps after which the policy is kept as it then is, and the folder of each.
        turn: which policy this is of how many that the same command trains.
    """
    config: Any = trainer.args
    algorithm, pairs = plan.method.upper(), _pairs(trainer)
    of_pairs = "" if pairs is None else f" of {pairs} pairs"
    progress.say(f"policy {plan.name}: training with {algorithm}{of_pairs}, at most {config.max_steps} steps")
    default = default_beta(plan.method)
    if config.beta == 0:
        progress.warn(f"train.{plan.method}.beta is 0: nothing holds policy {plan.name} near the base (default {default})")
    title = f"train {plan.name}" + (f" ({turn[0]} of {turn[1]})" if turn[1] > 1 else "")
    card = {"objective": plan.name, "method": plan.method}
    trainer.add_callback(KeepCallback({step: partial(save_policy, trainer, to, card) for step, to in (keep or {}).items()}))
    go_on(trainer, checkpoints, progress, title, *_shown(trainer), following=turn[1] - turn[0])
    result = _outcome(trainer, plan, config)
    if PartialState().is_main_process:
        save_policy(trainer, policy, card)
        trainer_callback(trainer, CostCallback).flush()
    if result.collapsed:
        progress.warn(
            f"policy {plan.name} has collapsed: distinct completions {result.distinct_share:.2f}, "
            f"base {result.base_distinct_share:.2f}; raise beta or lower learning_rate"
        )
    PartialState().wait_for_everyone()
    return result


def go_on(trainer: Any, checkpoints: Path, progress: Progress, title: str, *shown: str, following: int = 0) -> None:
    """Trains from the last complete checkpoint to the end, behind a progress bar.

    Args:
        shown: what the bar shows, as `ProgressCallback` takes it.
        following: trainings that come after this one.
    """
    checkpoint = last_complete_checkpoint(checkpoints)
    trainer.args.eval_on_start = checkpoint is None  # the log of a resumed run has that validation already
    done = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
    with progress.bar(title, trainer.args.max_steps, done=done, following=following) as bar:
        trainer.add_callback(ProgressCallback(bar, *shown))
        trainer.train(resume_from_checkpoint=checkpoint)


def _shown(trainer: PolicyTrainer) -> tuple[str, str]:
    """What the progress bar shows of the trainer's log: the mean reward, that of the logs, or the share of pairs in order."""
    if isinstance(trainer, DPOPolicyTrainer):
        return "rewards/accuracies", "pairs in order"
    log = any(objective.scale.log for objective in trainer.validation.objectives)
    return "reward", "log reward" if log else "reward"


def _pairs(trainer: PolicyTrainer) -> int | None:
    """How many pairs it trains on; None where it samples."""
    return len(trainer.pairs.train) if isinstance(trainer, DPOPolicyTrainer) else None


def trainer_callback(trainer: Any, kind: type) -> Any:
    """The trainer's callback of a kind."""
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kind))


def _outcome(trainer: PolicyTrainer, plan: PolicyPlan, config: TrainerConfig) -> TrainingResult:
    """How training ended, from the logged validations. Scores outside the range are those of this process since its start."""
    validations = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    best_step = trainer.state.best_global_step or trainer.state.global_step
    best = next((entry for entry in reversed(validations) if entry["step"] == best_step), validations[-1])
    first = validations[0]
    collapse: CollapseCallback = trainer_callback(trainer, CollapseCallback)
    objectives = trainer.validation.objectives
    return TrainingResult(
        objective=plan.name,
        reward_weights=dict(zip(plan.objectives, plan.reward_weights, strict=True)),
        steps=trainer.state.global_step,
        best_step=best_step,
        stopped=next((c.reason for c in trainer.callback_handler.callbacks if getattr(c, "reason", "")), "max_steps reached"),
        prompts_per_step=prompts_per_step(config),
        base_reward=first["eval_reward"],
        reward=best["eval_reward"],
        scores={objective.name: best[f"eval_{SCORE}{objective.name}"] for objective in objectives},
        kl=best.get("eval_kl"),
        scale="; ".join(str(objective.scale) for objective in objectives),
        scores_outside_range=sum(objective.outside for objective in objectives),
        base_distinct_share=first["eval_distinct_share"],
        distinct_share=best["eval_distinct_share"],
        words=best["eval_words"],
        collapsed=collapse.is_collapsed(best["eval_distinct_share"], first["eval_distinct_share"]),
        log=trainer.state.log_history,
        method=plan.method,
        pairs=_pairs(trainer),
        pair_accuracy=best.get(f"eval_{PAIR_ACCURACY}"),
    )


def save_policy(trainer: Any, directory: Path, card: Mapping[str, Any]) -> None:
    """Adapter (or the whole model, where all of it was tuned), tokenizer and `policy.json`, whole or not at all.

    Args:
        trainer: of a policy; it knows its base's fingerprint.
        card: what `policy.json` says beside the base.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    tokenizer: Any = trainer.processing_class
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)  # a policy without a finished run is from a kill in the next lines
    model.save_pretrained(partial, safe_serialization=True)
    tokenizer.save_pretrained(partial)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    described = {**card, "base": base.name_or_path, "base_fingerprint": trainer.base_fingerprint}
    write_json(partial / POLICY_CARD, described)
    partial.rename(directory)
