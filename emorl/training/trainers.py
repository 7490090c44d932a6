"""TRL's GRPOTrainer and DPOTrainer (decoders) and our SCSTTrainer (encoder-decoders) as the train stage uses them: one set of
defaults, one validation.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
from transformers import PrinterCallback
from trl import DistillationConfig, DPOConfig, GRPOConfig, GRPOTrainer

from emorl.config import UserError
from emorl.config.experiment import BaseConfig
from emorl.config.library import library_settings
from emorl.config.objects import shown_name
from emorl.config.train import Method, TrainConfig
from emorl.data import Splits
from emorl.objectives.loading import Objective
from emorl.policies.adapters import base_fingerprint
from emorl.policies.base import Base, dtype_of, is_encoder_decoder
from emorl.policies.generation import check_generation
from emorl.policies.placement import check_in_memory
from emorl.policies.prompts import answers_begin_after
from emorl.runs.run import Run
from emorl.training.callbacks import CollapseCallback, ConvergenceCallback, CostCallback, RewardCounter
from emorl.training.dpo import DPO_BETA, STEPS, DPOPolicyTrainer, PairSplits, dpo_defaults
from emorl.training.dynaopt import DynaOptCallback
from emorl.training.modes import PolicyPlan
from emorl.training.scst import SCSTConfig, SCSTTrainer
from emorl.training.validation import ValidatedPolicy, Validation

BETA = 0.05  # paper's coefficient; its own KL term is identically zero
_SET_BY_EMORL = {
    "output_dir": "output",
    "num_train_epochs": "{block}.max_steps",
    "seed": "seed",
    "load_best_model_at_end": "nothing: the best checkpoint is always kept",
    "metric_for_best_model": "nothing: emorl's own validation chooses",
    "greater_is_better": "nothing: emorl's own validation chooses",
    "eval_strategy": "{block}.eval_steps",
    "save_strategy": "{block}.eval_steps",
    "save_steps": "{block}.eval_steps: every validation leaves a checkpoint, so that the best one is there",
    "reward_weights": "train.mode and train.preferences",
    "multi_objective_aggregation": "train.mode",
    "model_init_kwargs": "base",
    "chat_template_kwargs": "data.chat_template_kwargs",
}

_MOST_STEPS = {"train.dpo": STEPS, "distill.trainer": 200}
"""where it is not 400"""

TrainerConfig = GRPOConfig | SCSTConfig | DPOConfig


class GRPOPolicyTrainer(ValidatedPolicy, GRPOTrainer):
    """GRPO with emorl's validation."""


class SCSTPolicyTrainer(ValidatedPolicy, SCSTTrainer):
    """SCST with emorl's validation."""


PolicyTrainer = GRPOPolicyTrainer | SCSTPolicyTrainer | DPOPolicyTrainer
_TRAINERS: dict[Method, tuple[Any, Any]] = {
    "grpo": (GRPOConfig, GRPOPolicyTrainer),
    "scst": (SCSTConfig, SCSTPolicyTrainer),
    "dpo": (DPOConfig, DPOPolicyTrainer),
}
"""method -> its settings and its trainer"""


def trainer_config(
    plan: PolicyPlan, train: TrainConfig, base: BaseConfig, generation: Mapping[str, Any], seed: int, output: Path
) -> TrainerConfig:
    """The block of the plan's method, with our defaults for what it leaves out.

    Args:
        generation: how the policy will be used; its length is the training's.
        output: where checkpoints go.

    Raises:
        UserError: an unknown or impossible setting, or one that emorl sets itself.
    """
    name, block = training_block(train, plan.method)
    kind, _ = _TRAINERS[plan.method]
    refuse_ours(block, name)
    steps, eval_steps = training_steps(name, block)
    defaults = shared_defaults(dtype_of(base), steps, eval_steps)
    fixed = shared_settings(output, seed, eval_steps)
    if kind is DPOConfig:
        defaults |= dpo_defaults()
    else:
        defaults |= {"beta": default_beta(plan.method), "max_completion_length": generation.get("max_new_tokens", 64)}
        defaults |= {"num_generations_eval": 1} if kind is GRPOConfig else {}
        fixed |= {"reward_weights": list(plan.reward_weights), "multi_objective_aggregation": plan.aggregation}
    config = library_settings(kind, block, name, kind.__name__, defaults, fixed)
    if config.beta < 0:
        raise UserError(f"{name}.beta: expected a number of at least 0, got {config.beta!r:.60}")
    if isinstance(config, GRPOConfig) and config.generation_kwargs:
        check_generation(dict(config.generation_kwargs), f"{name}.generation_kwargs")  # type: ignore[arg-type]
    return config


def training_method(asked: Method | None, train: TrainConfig, base: BaseConfig) -> Method:
    """How a policy of this base is trained: as it is `asked`, by default by scst where the base has an encoder, else by grpo.

    Raises:
        UserError: a method, or settings of one, that are not for such a base.
    """
    fitting: tuple[Method, ...] = ("scst",) if is_encoder_decoder(base) else ("grpo", "dpo")
    what = f"base.model {shown_name(base.model)!r} is {'an encoder-decoder' if len(fitting) == 1 else 'a decoder'}"
    for name in _TRAINERS:
        if getattr(train, name) and name not in fitting:
            raise UserError(f"train.{name} has settings, but {what}; use train.{fitting[0]}")
    if asked is not None and asked not in fitting:
        raise UserError(f"method {asked} cannot train it: {what}; use {' or '.join(fitting)}")
    return asked or fitting[0]


def training_block(train: TrainConfig, method: Method) -> tuple[str, Mapping[str, Any]]:
    """Name and content of a method's block."""
    return f"train.{method}", getattr(train, method)


def training_steps(name: str, block: Mapping[str, Any], every: int = 8) -> tuple[int, int]:
    """Most steps, and steps between two validations.

    Args:
        every: steps between two validations where the block does not say (paper: 8).

    Raises:
        UserError: no whole numbers.
    """
    most = _MOST_STEPS.get(name, 400)
    steps, eval_steps = block.get("max_steps", most), block.get("eval_steps", every)
    for key, value in (("max_steps", steps), ("eval_steps", eval_steps)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}.{key}: expected a whole number of at least 1, got {value!r:.60}")
    return steps, min(eval_steps, steps)


def default_beta(method: Method) -> float:
    """What holds a policy near the base where its block does not say."""
    return DPO_BETA if method == "dpo" else BETA


def refuse_ours(block: Mapping[str, Any], name: str) -> None:
    """Refuses settings of a trainer's block that emorl sets itself."""
    for key in block:
        if key in _SET_BY_EMORL:
            raise UserError(f"{name}.{key} is set by emorl; use {_SET_BY_EMORL[key].format(block=name)}")


def shared_settings(output: Path, seed: int, eval_steps: int) -> dict[str, Any]:
    """What no trainer's block can change.

    Args:
        output: where checkpoints go.
    """
    return {
        "output_dir": str(output),
        "seed": seed,
        "eval_steps": eval_steps,
        "save_steps": eval_steps,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_selection",
        "greater_is_better": True,
        "eval_strategy": "steps",
        "save_strategy": "steps",
    }


def shared_defaults(dtype: torch.dtype, steps: int, eval_steps: int) -> dict[str, Any]:
    """What every trainer's block leaves out."""
    return {
        "learning_rate": 1e-4,  # paper
        "lr_scheduler_type": "constant",  # paper
        "max_grad_norm": 2.0,  # paper
        "max_steps": steps,
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


def prompts_per_step(config: TrainerConfig | DistillationConfig) -> int:
    """Training prompts drawn per optimiser step, over all processes; of pairs, how many are read."""
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
    pairs: PairSplits | None = None,
    start: Path | None = None,
) -> PolicyTrainer:
    """The trainer of the plan's method; it changes the base.

    Args:
        objectives: the plan's; none where its pairs alone say what is better.
        pairs: what DPO reads in place of `splits.train`.
        start: a policy's folder, whose adapter the training begins with; a new one by default.

    Raises:
        UserError: settings that TRL refuses, or a base that is offloaded in parts: PEFT gives adapters there no values.
    """
    check_in_memory(base.model, "training")
    if lora is None:
        base.model.requires_grad_(True)
    cost, rule = CostCallback(run), train.collapse
    converges = ConvergenceCallback(train.convergence.window, train.convergence.threshold)
    read = _sampled(base, splits, objectives, cost) if pairs is None else {"pairs": pairs}
    _, kind = _TRAINERS[plan.method]
    trainer: PolicyTrainer = made(
        kind,
        "train",
        validation=Validation(objectives, plan.reward_weights, generation, splits.validation),
        fingerprint=base_fingerprint(base.model),
        model=base.model,
        processing_class=base.tokenizer,
        args=config,
        peft_config=lora,
        callbacks=[converges, CollapseCallback(rule.share, rule.patience), cost],
        **read,
    )
    if start is not None:
        set_peft_model_state_dict(trainer.model, load_peft_weights(str(start)))
    if plan.adaptive:
        _let_weights_move(trainer, plan, train.dynaopt.gamma)
    trainer.remove_callback(PrinterCallback)  # our progress bar shows the rewards; `result.json` and `report_to` keep the rest
    return trainer


def made(kind: Any, where: str, **options: Any) -> Any:
    """A trainer of a kind.

    Args:
        where: the settings' block, for the message.

    Raises:
        UserError: settings that TRL refuses.
    """
    try:
        return kind(**options)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None


def _sampled(base: Base, splits: Splits, objectives: Sequence[Objective], cost: CostCallback) -> dict[str, Any]:
    """What a trainer that samples reads: prompts, and what rewards its samples."""
    after = answers_begin_after(base.tokenizer)
    counters = [RewardCounter(objective, cost, index == 0, after) for index, objective in enumerate(objectives)]
    return {"reward_funcs": counters, "train_dataset": splits.train, "eval_dataset": splits.validation}


def _let_weights_move(trainer: Any, plan: PolicyPlan, gamma: float) -> None:
    """Adds DynaOpt's bandit to a trainer."""

    def set_weights(weights: list[float]) -> None:
        trainer.reward_weights = torch.tensor(weights, dtype=torch.float32)

    trainer.add_callback(DynaOptCallback(list(plan.objectives), gamma, trainer.args.seed, set_weights))
