"""TRL's GRPOTrainer (decoders) and our SCSTTrainer (encoder-decoders) as the train stage uses them: one set of defaults, and
emorl's own evaluation as their validation, so that curves, search and report measure the same.

Every process of a distributed run validates all validation prompts: they are few, and so all processes take the same decision.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from emorl.config import UserError
from emorl.config.experiment import BaseConfig, TrainConfig
from emorl.config.library import library_settings
from emorl.config.objects import shown_name
from emorl.data import Splits
from emorl.evaluation.scoring import evaluate, summarize
from emorl.objectives.loading import Objective
from emorl.policies.adapters import base_fingerprint
from emorl.policies.base import Base, dtype_of, is_encoder_decoder
from emorl.policies.generation import check_generation
from emorl.policies.placement import check_in_memory
from emorl.policies.prompts import answers_begin_after
from emorl.runs.run import Run
from emorl.training.anchor import kl_to_base
from emorl.training.callbacks import CollapseCallback, ConvergenceCallback, CostCallback, RewardCounter
from emorl.training.dynaopt import SCORE, DynaOptCallback
from emorl.training.modes import PolicyPlan
from emorl.training.scst import SCSTConfig, SCSTTrainer

BETA = 0.05  # paper's coefficient; its own KL term is identically zero
_VALIDATED = ("distinct_share", "distinct_2", "words", "repeated_trigrams")  # beside the rewards
_SET_BY_EMORL = {
    "output_dir": "output",
    "seed": "seed",
    "load_best_model_at_end": "nothing: the best checkpoint is always kept",
    "metric_for_best_model": "nothing: validation reward of checkpoints that have not collapsed",
    "greater_is_better": "nothing: rewards are maximised",
    "eval_strategy": "{block}.eval_steps",
    "save_strategy": "{block}.save_steps",
    "reward_weights": "train.mode and train.preferences",
    "multi_objective_aggregation": "train.mode",
    "model_init_kwargs": "base",
    "chat_template_kwargs": "data.chat_template_kwargs",
}

TrainerConfig = GRPOConfig | SCSTConfig


@dataclass(frozen=True)
class Validation:
    """What a policy is validated by: decoding as it will be used, scored by its objectives."""

    objectives: Sequence[Objective]
    reward_weights: Sequence[float]  # (O,), for the validation reward; an adaptive plan's do not move
    generation: Mapping[str, Any]
    data: Dataset


class _ValidatedPolicy:
    """Replaces a trainer's evaluation."""

    def __init__(self, *, validation: Validation, fingerprint: str, **options: Any) -> None:
        super().__init__(**options)
        self.validation = validation
        self.base_fingerprint = fingerprint

    def evaluate(  # called by Trainer
        self: Any, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Decodes the validation prompts; metrics `eval_reward` (weighted mean of the scores, also where training maximises
        their logs), `eval_score_<objective>`, `eval_kl` and `eval_` before what `_VALIDATED` names."""
        start, training = time.perf_counter(), self.model.training
        self.model.eval()
        what, tokenizer = self.validation, self.processing_class
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            table = evaluate(model, tokenizer, what.data, what.objectives, what.generation, seed=self.args.seed).table
            prompts = [what.data["prompt"][index] for index in table["prompt_index"]]
            kl = kl_to_base(model, tokenizer, prompts, table.get("generated", table["completion"]).tolist(), self.ref_model)
        names = [objective.name for objective in what.objectives]
        summary = summarize(table, names)
        for name in names:
            if math.isnan(summary[name]):
                raise UserError(
                    f"objective {name!r} returned None for every one of {len(table)} answers; training needs scores"
                )
        found = {key: summary[key] for key in _VALIDATED}
        found |= {f"{SCORE}{name}": summary[name] for name in names}
        found["reward"] = sum(weight * summary[name] for weight, name in zip(what.reward_weights, names, strict=True))
        found |= {"completions": len(table), "tokens": int(table["tokens"].sum()), "runtime": time.perf_counter() - start}
        if kl is not None:
            found["kl"] = kl
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.model.train(training)
        return metrics


class GRPOPolicyTrainer(_ValidatedPolicy, GRPOTrainer):
    """GRPO with emorl's validation."""


class SCSTPolicyTrainer(_ValidatedPolicy, SCSTTrainer):
    """SCST with emorl's validation."""


PolicyTrainer = GRPOPolicyTrainer | SCSTPolicyTrainer


def trainer_config(
    plan: PolicyPlan, train: TrainConfig, base: BaseConfig, generation: Mapping[str, Any], seed: int, output: Path
) -> TrainerConfig:
    """The `grpo:` or `scst:` block, whichever suits the base, with our defaults for what it leaves out.

    Args:
        generation: how the policy will be used; its length is the training's.
        output: where checkpoints go.

    Raises:
        UserError: an unknown or impossible setting, or one that emorl sets itself.
    """
    name, block = training_block(train, base)
    kind = SCSTConfig if name == "train.scst" else GRPOConfig
    for key in block:
        if key in _SET_BY_EMORL:
            raise UserError(f"{name}.{key} is set by emorl; use {_SET_BY_EMORL[key].format(block=name)}")
    steps, eval_steps = training_steps(name, block)
    length = generation.get("max_new_tokens", 64)
    of_kind = {"num_generations_eval": 1} if kind is GRPOConfig else {}
    defaults = {**_defaults(dtype_of(base), length, steps, eval_steps), **of_kind}
    fixed = {
        "output_dir": str(output),
        "seed": seed,
        "eval_steps": eval_steps,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_selection",
        "greater_is_better": True,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "reward_weights": list(plan.reward_weights),
        "multi_objective_aggregation": plan.aggregation,
    }
    config = library_settings(kind, block, name, kind.__name__, defaults, fixed)
    if config.beta < 0:
        raise UserError(f"{name}.beta: expected a number of at least 0, got {config.beta!r:.60}")
    if isinstance(config, GRPOConfig) and config.generation_kwargs:
        check_generation(dict(config.generation_kwargs), f"{name}.generation_kwargs")  # type: ignore[arg-type]
    return config


def training_block(train: TrainConfig, base: BaseConfig) -> tuple[str, Mapping[str, Any]]:
    """Name and content of the block that suits the base: `train.scst` for an encoder-decoder, else `train.grpo`.

    Raises:
        UserError: the other block has settings.
    """
    blocks = {"train.grpo": train.grpo, "train.scst": train.scst}
    encoder_decoder = is_encoder_decoder(base)
    name, other = ("train.scst", "train.grpo") if encoder_decoder else ("train.grpo", "train.scst")
    if blocks[other]:
        what = "an encoder-decoder" if encoder_decoder else "a decoder"
        raise UserError(f"{other} has settings, but base.model {shown_name(base.model)!r} is {what}; use {name}")
    return name, blocks[name]


def training_steps(name: str, block: Mapping[str, Any]) -> tuple[int, int]:
    """Most steps, and steps between two validations.

    Raises:
        UserError: no whole numbers.
    """
    steps, eval_steps = block.get("max_steps", 400), block.get("eval_steps", 8)  # paper: validation every 8 steps
    for key, value in (("max_steps", steps), ("eval_steps", eval_steps)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}.{key}: expected a whole number of at least 1, got {value!r:.60}")
    return steps, min(eval_steps, steps)


def _defaults(dtype: torch.dtype, length: int, steps: int, eval_steps: int) -> dict[str, Any]:
    return {
        "learning_rate": 1e-4,  # paper
        "lr_scheduler_type": "constant",  # paper
        "max_grad_norm": 2.0,  # paper
        "max_steps": steps,
        "beta": BETA,
        "max_completion_length": length,
        "save_steps": eval_steps,
        "save_total_limit": 2,
        "logging_steps": 1,
        "eval_on_start": True,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16 and torch.cuda.is_available(),  # which torch refuses elsewhere
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "save_only_model": False,
    }


def prompts_per_step(config: TrainerConfig) -> int:
    """Training prompts drawn per optimiser step, over all processes."""
    rows: int = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    return rows // (config.num_generations or 1) if isinstance(config, GRPOConfig) else rows


def build_trainer(
    plan: PolicyPlan,
    train: TrainConfig,
    config: TrainerConfig,
    lora: LoraConfig | None,
    *,
    base: Base,
    splits: Splits,
    objectives: Sequence[Objective],
    generation: Mapping[str, Any],
    run: Run,
) -> PolicyTrainer:
    """The trainer that suits the base, which it changes; `objectives` are the plan's.

    Raises:
        UserError: settings that TRL refuses, or a base that is offloaded in parts: PEFT gives adapters there no values.
    """
    check_in_memory(base.model, "training")
    if lora is None:
        base.model.requires_grad_(True)
    cost = CostCallback(run)
    callbacks: list[TrainerCallback] = [
        ConvergenceCallback(train.convergence.window, train.convergence.threshold),
        CollapseCallback(train.collapse.share, train.collapse.patience),
        cost,
    ]
    kind: Any = GRPOPolicyTrainer if isinstance(config, GRPOConfig) else SCSTPolicyTrainer
    after = answers_begin_after(base.tokenizer)
    counters = [RewardCounter(objective, cost, index == 0, after) for index, objective in enumerate(objectives)]
    try:
        trainer = kind(
            validation=Validation(objectives, plan.reward_weights, generation, splits.validation),
            fingerprint=base_fingerprint(base.model),
            model=base.model,
            processing_class=base.tokenizer,
            reward_funcs=counters,
            args=config,
            train_dataset=splits.train,
            eval_dataset=splits.validation,
            peft_config=lora,
            callbacks=callbacks,
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"train: {' '.join(str(error).split())}") from None
    if plan.adaptive:
        _let_weights_move(trainer, plan, train.dynaopt.gamma)
    trainer.remove_callback(PrinterCallback)  # our progress bar shows the rewards; `result.json` and `report_to` keep the rest
    return trainer


def _let_weights_move(trainer: PolicyTrainer, plan: PolicyPlan, gamma: float) -> None:
    """Adds DynaOpt's bandit to a trainer."""

    def set_weights(weights: list[float]) -> None:
        trainer.reward_weights = torch.tensor(weights, dtype=torch.float32)

    trainer.add_callback(DynaOptCallback(list(plan.objectives), gamma, trainer.args.seed, set_weights))
