"""One step of training on a tiny model: what a trainer would refuse is met before the real base is loaded.

TRL and transformers look at many settings where they first use them, be that after an hour of sampling.
"""

import copy
import functools
import importlib.util
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from trl import DistillationConfig, DistillationTrainer, DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from emorl.config import UserError
from emorl.config.library import REFUSALS, refused
from emorl.policies.tiny import tiny_model, tiny_tokenizer
from emorl.training.scst import SCSTConfig, SCSTTrainer

_ALONE = {
    "max_steps": 1,
    "report_to": [],
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "logging_strategy": "no",
    "log_completions": False,
    "log_completions_hub_repo": None,
    "push_to_hub": False,
    "disable_tqdm": True,
}
"""a rehearsal writes, shows and sends nothing"""


def rehearse(config: GRPOConfig | SCSTConfig | DPOConfig | DistillationConfig, where: str) -> None:
    """Takes one step with these settings; a distributed launch, vLLM and compiled models are not rehearsed.

    Args:
        where: the settings' block, for the message.

    Raises:
        UserError: what the trainer refuses.
    """
    check_reporters(config, where)
    if not _is_cheap(config):
        return
    try:
        steps = _steps(type(config), _Alone(config))
    except REFUSALS as error:
        raise refused(where, error) from None
    if steps == 0:
        raise UserError(f"{where}: with these settings no step is ever taken; look at num_iterations and the batch sizes")


def check_reporters(config: TrainingArguments, where: str) -> None:
    """Refuses a tracker of `report_to` that is unknown or not installed."""
    try:
        for reporter in get_reporting_integration_callbacks(config.report_to):
            reporter()
    except REFUSALS as error:
        raise refused(f"{where}.report_to", error) from None


class _Alone:
    """Settings that are compared by what they say, so that equal ones are rehearsed once."""

    def __init__(self, config: GRPOConfig | SCSTConfig | DPOConfig | DistillationConfig) -> None:
        self.config = copy.copy(config)
        for name, value in _ALONE.items():
            if hasattr(config, name):
                setattr(self.config, name, value)
        if not isinstance(self.config, DPOConfig):
            self.config.max_completion_length = min(self.config.max_completion_length or 2, 2)
        self._said = {name: value for name, value in vars(self.config).items() if name != "output_dir"}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Alone) and repr(self._said) == repr(other._said)

    def __hash__(self) -> int:
        return hash(repr(self._said))


def _is_cheap(config: Any) -> bool:
    has_engine = getattr(config, "use_vllm", False) and importlib.util.find_spec("vllm") is not None
    return config.world_size == 1 and not (has_engine or config.deepspeed or config.fsdp or config.torch_compile)


@functools.cache
def _steps(kind: type[Any], alone: _Alone) -> int:
    """Steps that were taken: 1, if all is well."""
    trainer_kind, read = _trainer(kind, alone.config)
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        alone.config.output_dir = folder
        trainer = trainer_kind(
            model=tiny_model(encoder_decoder=kind is SCSTConfig),
            args=alone.config,
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(
                r=1, task_type="SEQ_2_SEQ_LM" if kind is SCSTConfig else "CAUSAL_LM", target_modules="all-linear"
            ),
            **read,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer.state.global_step


def _trainer(kind: type[Any], config: Any) -> tuple[Any, dict[str, Any]]:
    """The trainer of a kind of settings, and what it reads."""
    prompts = ["abc"] * 300
    if kind is DPOConfig:
        prompts = prompts[:1] * config.per_device_train_batch_size * config.gradient_accumulation_steps
        pairs = {"prompt": prompts, "chosen": ["de"] * len(prompts), "rejected": ["fg"] * len(prompts)}
        return DPOTrainer, {"train_dataset": Dataset.from_dict(pairs)}
    data = Dataset.from_dict({"prompt": prompts})
    if kind is DistillationConfig:
        return DistillationTrainer, {"teacher_model": tiny_model(), "train_dataset": data}
    trainer = GRPOTrainer if kind is GRPOConfig else SCSTTrainer
    return trainer, {"reward_funcs": [_reward] * len(config.reward_weights or [1.0]), "train_dataset": data}


def _reward(completions: list[Any], **columns: Any) -> list[float]:
    return [float(index % 2) for index in range(len(completions))]
