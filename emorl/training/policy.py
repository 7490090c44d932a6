"""Train stage: one LoRA policy for one objective, by TRL's GRPO (`emorl train experiment.yaml --objective NAME`).

Departures from EMORL (arXiv 2505.02579), whose authors use self-critical sequence training on T5 without an effective
KL term: TRL's GRPO with `beta` > 0, and the KL it leads to is measured at every validation; validation decodes as the policy
will be used (the experiment's `generation`), and the best checkpoint that has not collapsed is kept instead of the last. Every
process of a distributed run validates all validation prompts: they are few, and so all processes take the same decision.
"""

import dataclasses
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from emorl.config import UserError, as_mapping, check_keys, nearest
from emorl.data import load_prompts
from emorl.evaluation.scoring import check_generation, evaluate, summarize
from emorl.experiment import Experiment
from emorl.objectives.loading import Objective, check_objectives, load_objective, outside_range
from emorl.policies.adapters import base_fingerprint
from emorl.policies.loading import load_base, load_tokenizer
from emorl.policies.prompts import is_chat
from emorl.progress import Progress, Silent
from emorl.runs import Run, only_process, open_run, write_json
from emorl.training.anchor import kl_to_base
from emorl.training.callbacks import (
    CollapseCallback,
    ConvergenceCallback,
    CostCallback,
    ProgressCallback,
    RewardCounter,
)
from emorl.training.checkpoints import last_complete_checkpoint

POLICY_DIRECTORY = "policy"
CHECKPOINTS = "checkpoints"
_BETA = 0.05  # paper's coefficient; its own KL term is identically zero
_VALIDATED = ("distinct_share", "distinct_2", "words", "repeated_trigrams")  # beside the reward
_SET_BY_EMORL = {
    "output_dir": "output",
    "seed": "seed",
    "load_best_model_at_end": "nothing: the best checkpoint is always kept",
    "metric_for_best_model": "nothing: validation reward of checkpoints that have not collapsed",
    "greater_is_better": "nothing: rewards are maximised",
    "eval_strategy": "grpo.eval_steps",
    "save_strategy": "grpo.save_steps",
}


def train(experiment: Experiment, name: str, progress: Progress | None = None) -> Path:
    """Trains the policy of one objective; returns its run directory, with the adapter in `policy/`.

    Skips a finished run and continues an interrupted one from its last complete checkpoint. Under `accelerate launch` or
    `torchrun` every process calls this.

    Raises:
        UserError: an unknown objective or setting, or a run directory that holds another run.
    """
    if progress is None or not PartialState().is_main_process:
        progress = Silent()
    if name not in experiment.objectives:
        raise UserError(f"no objective {name!r} in this experiment; {nearest(name, experiment.objectives)}")
    check_objectives({name: experiment.objectives[name]})
    check_generation(experiment.generation)
    path = experiment.training_of(name)
    if experiment.policies is not None:
        policy_directories(experiment)
        progress.say(f"policy {name}: of {path}")
        return path
    grpo, lora = _grpo_config(experiment, name), _lora_config(experiment)
    if not PartialState().is_main_process:
        return _train_as(experiment, name, grpo, lora, None, progress)
    with only_process(path):
        return _train_as(experiment, name, grpo, lora, open_run(path, "train", _identity(experiment, name)), progress)


def policy_directories(experiment: Experiment) -> dict[str, Path]:
    """Objective -> adapter directory of its finished policy, in the objectives' order.

    Raises:
        UserError: a policy has not been trained yet.
    """
    directories = {name: experiment.training_of(name) / POLICY_DIRECTORY for name in experiment.objectives}
    missing = [name for name, directory in directories.items() if not (directory / "policy.json").is_file()]
    if missing:
        where = experiment.policies or experiment.output
        raise UserError(
            f"no trained policy for {', '.join(missing)} in {where}; run `emorl train` first, or give `policies`, the output "
            "of the experiment that trained them"
        )
    return directories


def _identity(experiment: Experiment, name: str) -> dict[str, Any]:
    """What the result depends on: other objectives, search and report settings do not matter."""
    whole = as_mapping(experiment)
    parts = {key: whole[key] for key in ("base", "data", "train", "generation", "seed")}
    return {**parts, "objective": {name: whole["objectives"][name]}}


def _train_as(
    experiment: Experiment, name: str, grpo: GRPOConfig, lora: LoraConfig, run: Run | None, progress: Progress
) -> Path:
    """Trains in this process; `run` is None in all processes but the main one."""
    path = experiment.training_of(name)
    finished = [run.finished if run else False]
    broadcast_object_list(finished)
    if finished[0]:
        progress.say(f"policy {name}: trained before, in {path}")
        return path
    progress.say(f"policy {name}: training with GRPO, at most {grpo.max_steps} steps")
    if grpo.beta == 0:
        progress.warn(f"train.grpo.beta is 0: nothing holds policy {name} near the base (default {_BETA})")
    cost = CostCallback(run)
    trainer = _build_trainer(experiment, name, grpo, lora, cost)
    checkpoint = last_complete_checkpoint(path / CHECKPOINTS)
    trainer.args.eval_on_start = checkpoint is None  # the log of a resumed run has that validation already
    with progress.bar(f"train {name}", grpo.max_steps) as bar:
        trainer.add_callback(ProgressCallback(bar, log=trainer.objective.scale.log))
        trainer.train(resume_from_checkpoint=checkpoint)
    report = _outcome(trainer, name)
    if run is not None:
        _save_policy(trainer, path / POLICY_DIRECTORY, name)
        write_json(path / "result.json", report)
        cost.flush()
        run.finish()
    for line in outside_range([trainer.objective]):
        progress.warn(line)
    if report["collapsed"]:
        progress.warn(
            f"policy {name} has collapsed: distinct completions {report['distinct_share']:.2f}, "
            f"base {report['base_distinct_share']:.2f}; raise grpo.beta or lower grpo.learning_rate"
        )
    PartialState().wait_for_everyone()
    return path


def _grpo_config(experiment: Experiment, name: str) -> GRPOConfig:
    """The `grpo:` block as GRPOConfig, with our defaults for what it leaves out."""
    block = experiment.train.grpo
    known = {field.name for field in dataclasses.fields(GRPOConfig)}
    for key in block:
        if key in _SET_BY_EMORL:
            raise UserError(f"train.grpo.{key} is set by emorl; use {_SET_BY_EMORL[key]}")
    check_keys(block, known, "train.grpo", "trl.GRPOConfig")
    steps = block.get("max_steps", 400)
    eval_steps = min(block.get("eval_steps", 8), steps)  # paper: validation every 8 steps
    defaults = {
        "learning_rate": 1e-4,  # paper
        "lr_scheduler_type": "constant",  # paper
        "max_grad_norm": 2.0,  # paper
        "max_steps": steps,
        "beta": _BETA,
        "max_completion_length": experiment.generation.get("max_new_tokens", 64),
        "eval_steps": eval_steps,
        "save_steps": eval_steps,
        "num_generations_eval": 1,  # TRL checks it against its own evaluation, which ours replaces
        "save_total_limit": 2,
        "logging_steps": 1,
        "eval_on_start": True,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": experiment.base.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "save_only_model": False,
    }
    fixed = {
        "output_dir": str(experiment.training_of(name) / CHECKPOINTS),
        "seed": experiment.seed,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_selection",
        "greater_is_better": True,
        "eval_strategy": "steps",
        "save_strategy": "steps",
    }
    try:
        grpo = GRPOConfig(**{**defaults, **block, "eval_steps": eval_steps, **fixed})
    except (ValueError, TypeError) as error:
        raise UserError(f"train.grpo: {' '.join(str(error).split())}") from None
    if not isinstance(grpo.beta, (int, float)) or grpo.beta < 0:
        raise UserError(f"train.grpo.beta: expected a number of at least 0, got {grpo.beta!r:.60}")
    return grpo


def _lora_config(experiment: Experiment) -> LoraConfig:
    block = experiment.train.lora
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    check_keys(block, known, "train.lora", "peft.LoraConfig")
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **block})
    except (ValueError, TypeError) as error:
        raise UserError(f"train.lora: {' '.join(str(error).split())}") from None


class PolicyTrainer(GRPOTrainer):
    """GRPOTrainer whose validation is emorl's own evaluation, so that curves, search and report measure the same."""

    def __init__(self, *, objective: Objective, generation: Mapping[str, Any], fingerprint: str, **options: Any) -> None:
        super().__init__(**options)
        self.objective = objective
        self.base_fingerprint = fingerprint
        self._policy: Any = self.model
        self._tokenizer: Any = self.processing_class
        self._validation_generation = generation
        self._validation_data: Any = self.eval_dataset

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Decodes the validation prompts; metrics `eval_reward` (mean score, also where training maximises its log), `eval_kl`
        and `eval_` before what `_VALIDATED` names."""
        start, training = time.perf_counter(), self._policy.training
        self._policy.eval()
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            result = evaluate(
                model, self._tokenizer, self._validation_data, [self.objective], self._validation_generation,
                seed=self.args.seed,
            )  # fmt: skip
            prompts = [self._validation_data["prompt"][index] for index in result.table["prompt_index"]]
            kl = kl_to_base(model, self._tokenizer, prompts, result.table["completion"].tolist())
        summary = summarize(result.table, [self.objective.name])
        metrics = {f"{metric_key_prefix}_{key}": summary[key] for key in _VALIDATED}
        metrics[f"{metric_key_prefix}_reward"] = summary[self.objective.name]
        metrics[f"{metric_key_prefix}_kl"] = kl
        metrics[f"{metric_key_prefix}_completions"] = len(result.table)
        metrics[f"{metric_key_prefix}_tokens"] = int(result.table["tokens"].sum())
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._policy.train(training)
        return metrics


def _build_trainer(experiment: Experiment, name: str, grpo: GRPOConfig, lora: LoraConfig, cost: CostCallback) -> PolicyTrainer:
    splits = load_prompts(experiment.data, experiment.seed, is_chat(load_tokenizer(experiment.base.model)))
    objective = load_objective(name, experiment.objectives[name])
    base = load_base(experiment.base)
    callbacks: list[TrainerCallback] = [
        ConvergenceCallback(experiment.train.convergence.window, experiment.train.convergence.threshold),
        CollapseCallback(experiment.train.collapse.share, experiment.train.collapse.patience),
        cost,
    ]
    try:
        trainer = PolicyTrainer(
            objective=objective,
            generation=experiment.generation,
            fingerprint=base_fingerprint(base.model),
            model=base.model,
            processing_class=base.tokenizer,
            reward_funcs=[RewardCounter(objective, cost)],
            args=grpo,
            train_dataset=splits.train,
            eval_dataset=splits.validation,
            peft_config=lora,
            callbacks=callbacks,
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"train: {' '.join(str(error).split())}") from None
    trainer.remove_callback(PrinterCallback)  # our progress bar shows the rewards; `result.json` and `report_to` keep the rest
    return trainer


def _outcome(trainer: PolicyTrainer, name: str) -> dict[str, Any]:
    """How training ended, from the logged validations. Rewards are mean scores, `kl` is the kept policy's KL to the base in
    nats per token of its validation answers; in `log`, TRL's own `reward` is what it maximised. Scores outside the
    range are those of this process since its start."""
    validations = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    best_step = trainer.state.best_global_step or trainer.state.global_step
    best = next((entry for entry in reversed(validations) if entry["step"] == best_step), validations[-1])
    first = validations[0]
    collapse = next(c for c in trainer.callback_handler.callbacks if isinstance(c, CollapseCallback))
    return {
        "objective": name,
        "steps": trainer.state.global_step,
        "best_step": best_step,
        "stopped": next(
            (c.reason for c in trainer.callback_handler.callbacks if getattr(c, "reason", "")), "max_steps reached"
        ),
        "base_reward": first["eval_reward"],
        "reward": best["eval_reward"],
        "kl": best.get("eval_kl"),  # a run of an earlier version may be resumed
        "scale": str(trainer.objective.scale),
        "scores_outside_range": trainer.objective.outside,
        "base_distinct_share": first["eval_distinct_share"],
        "distinct_share": best["eval_distinct_share"],
        "words": best["eval_words"],
        "collapsed": collapse.is_collapsed(best["eval_distinct_share"], first["eval_distinct_share"]),
        "log": trainer.state.log_history,
    }


def _save_policy(trainer: PolicyTrainer, directory: Path, name: str) -> None:
    """Adapter, tokenizer and `policy.json` (objective, base, fingerprint), whole or not at all."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    tokenizer: Any = trainer.processing_class
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(directory, ignore_errors=True)  # a policy without a finished run is from a kill in the next lines
    model.save_pretrained(partial, safe_serialization=True)
    tokenizer.save_pretrained(partial)
    write_json(
        partial / "policy.json",
        {"objective": name, "base": model.get_base_model().name_or_path, "base_fingerprint": trainer.base_fingerprint},
    )
    partial.rename(directory)
