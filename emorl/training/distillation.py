"""TRL's DistillationTrainer with the ensemble as its teacher: on-policy distillation (GKD, arXiv 2306.13649).

The student answers the training prompts itself, and is trained towards the ensemble's distribution at every token of its
answer, by the generalised Jensen-Shannon divergence. MOPD (arXiv 2606.30406) does so with one teacher for each prompt; here
every prompt may have an ensemble of its own: weights in each row, and for the student another prompt that names them. Validated
is on texts of the teacher's, which stay the same, so that checkpoints, the start and rivals are compared without noise.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import PrinterCallback
from trl import DistillationConfig, DistillationTrainer

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.aggregation.teacher import Asked, EnsembleTeacher
from emorl.config import UserError
from emorl.config.experiment import BaseConfig
from emorl.config.library import library_settings
from emorl.policies.adapters import Adapter, base_fingerprint
from emorl.policies.base import Base, dtype_of
from emorl.policies.generation import check_generation
from emorl.policies.prompts import encode
from emorl.runs.layout import CHECKPOINTS, POLICY
from emorl.runs.progress import Progress
from emorl.runs.run import Cost, Run
from emorl.training.callbacks import CostCallback
from emorl.training.policy import go_on, save_policy, trainer_callback
from emorl.training.questions import Questions, TeacherTexts, divergences, teacher_texts
from emorl.training.student import begin_as_soup, make_student
from emorl.training.trainers import made, prompts_per_step, refuse_ours, shared_defaults, shared_settings, training_steps

BLOCK = "distill.trainer"
DIVERGENCE = "eval_divergence"
_EVERY = 25  # steps between two validations
_TEACHERS = ("teacher_model_name_or_path", "teacher_model_revision", "teacher_model_init_kwargs")


def distillation_config(
    block: Mapping[str, Any], base: BaseConfig, generation: Mapping[str, Any], seed: int, output: Path
) -> DistillationConfig:
    """The block `distill.trainer`, with our defaults for what it leaves out.

    Args:
        generation: how the student will be used; its length is the training's.
        output: where checkpoints go.

    Raises:
        UserError: an unknown or impossible setting, or one that emorl sets itself.
    """
    refuse_ours(block, BLOCK)
    for key in _TEACHERS:
        if key in block:
            raise UserError(f"{BLOCK}.{key} is set by emorl; the teacher is the ensemble")
    steps, eval_steps = training_steps(BLOCK, block, _EVERY)
    defaults = {
        **shared_defaults(dtype_of(base), steps, eval_steps),
        "max_completion_length": generation.get("max_new_tokens", 64),
        "per_device_train_batch_size": 16,
        "lr_scheduler_type": "cosine",  # its target stands still
    }
    fixed = {
        **shared_settings(output, seed, eval_steps),
        "metric_for_best_model": DIVERGENCE,
        "greater_is_better": False,
        "remove_unused_columns": False,
    }
    config = library_settings(DistillationConfig, block, BLOCK, "trl.DistillationConfig", defaults, fixed)
    if config.generation_kwargs:
        check_generation(dict(config.generation_kwargs), f"{BLOCK}.generation_kwargs")  # type: ignore[arg-type]
    if config.fsdp or config.deepspeed:
        raise UserError(
            f"{BLOCK}: teacher and student share the base's tensors, which FSDP and DeepSpeed would take apart; launch several "
            "processes without them (each has the whole base)"
        )
    return config


class EnsembleDistillation(DistillationTrainer):
    """Its teacher reads the prompt and the weights of each row; validated is the divergence on texts of the teacher's."""

    def __init__(
        self, *, teacher: EnsembleTeacher, texts: TeacherTexts, cost: CostCallback, fingerprint: str, **options: Any
    ) -> None:
        super().__init__(teacher_model=teacher, **options)  # pyright: ignore[reportArgumentType]
        self.texts, self.base_fingerprint = texts, fingerprint
        self._view, self._cost = teacher, cost

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:  # called by DistillationTrainer
        """The student's answers, and what its teacher is asked in each row."""
        output = super()._generate_and_score_completions(inputs)
        device = self.accelerator.device
        asked = encode(self.processing_class, [row["asked"] for row in inputs])  # type: ignore[arg-type]
        output["asked_ids"], output["asked_mask"] = asked["input_ids"].to(device), asked["attention_mask"].to(device)
        output["weights"] = torch.tensor([row["weights"] for row in inputs], device=device)
        answers = self.accelerator.num_processes * len(inputs)
        self._cost.add(Cost(prompts=answers, completions=answers, tokens=int(output["num_items_in_batch"])))
        return output

    def _compute_loss(self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:  # called likewise
        parts = (inputs[name] for name in ("asked_ids", "asked_mask", "weights"))
        with self._view.asked(Asked(*parts, new_tokens=inputs["completion_ids"].shape[1])):
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)

    def _get_last_hidden_state(  # called likewise
        self, unwrapped_model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **_: Any
    ) -> Tensor:
        """Of teacher or student (B, T, H), at the positions that predict the text. TRL's own counts the padding on the left as
        positions, which a base with learned positions would be trained at."""
        if isinstance(unwrapped_model, PeftModel):
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            backbone: Any = unwrapped_model.get_base_model().base_model
            more: dict[str, Any] = {"position_ids": positions, "use_cache": False}
        else:
            backbone, more = unwrapped_model.base_model, {}
        hidden = backbone(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        return hidden[:, -logits_to_keep - 1 : -1]

    def evaluate(  # called by Trainer
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """`eval_divergence`: nats per token of the teacher's texts; every process of several computes all of them."""
        start, student = time.perf_counter(), self.accelerator.unwrap_model(self.model)
        training = student.training
        student.eval()
        nats, tokens = divergences(student, self._view.base_model.ensemble, self.texts).sum(0).tolist()
        found = {"divergence": nats / tokens, "runtime": time.perf_counter() - start}
        found |= {"completions": 0, "tokens": 0, "reward_calls": 0}  # nothing is sampled or scored
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        student.train(training)
        return metrics


@dataclass(frozen=True)
class Lesson:
    """Which policies of a base are distilled, from what the student begins, and what teacher and student are asked."""

    base: Base
    policies: Mapping[str, Adapter]
    training: Questions
    validation: Questions
    start: Sequence[float]
    """of the policies: the weighted sum that the student begins as; all 0: the base"""
    include_base: bool = False
    """the base is one more policy, the last one in the questions' weights"""
    batch: int = 64
    """of the teacher's validation texts"""

    def ensemble(self) -> HiddenStateEnsemble:
        return HiddenStateEnsemble(self.base.model, self.policies, include_base=self.include_base)


@dataclass(frozen=True)
class Distilled:
    """How a distillation ended: divergences are on the validation texts, in nats per token; `kept_energy` is the share of the
    start's squared norm that the student could hold."""

    steps: int
    best_step: int
    answers_per_step: int
    kept_energy: float
    first_divergence: float
    divergence: float
    log: Sequence[Mapping[str, Any]]


def distill(
    lesson: Lesson,
    lora: LoraConfig,
    config: DistillationConfig,
    generation: Mapping[str, Any],
    run: Run,
    progress: Progress,
    card: Mapping[str, Any],
) -> Distilled:
    """Trains the student from the last complete checkpoint on, and writes the adapter that was kept to the run's `policy`;
    every process of a distributed run calls this.

    Args:
        generation: how the teacher's validation texts are decoded.
        card: what the policy's card says beside the base.

    Raises:
        UserError: an ensemble that cannot be a teacher, or settings that TRL refuses.
    """
    student = make_student(lesson.base.model, lora, config.seed)
    kept = begin_as_soup(student, list(lesson.policies.values()), lesson.start)
    begun = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(student).items()}
    trainer = build_trainer(lesson, student, config, generation, run)
    answers = prompts_per_step(config)  # one to each
    progress.say(f"distill: at most {config.max_steps} steps of {answers} answers")
    go_on(trainer, run.path / CHECKPOINTS, progress, "distill", "loss", "loss", DIVERGENCE)
    validated = {int(entry["step"]): entry[DIVERGENCE] for entry in trainer.state.log_history if DIVERGENCE in entry}
    best = min(validated, key=lambda step: (validated[step], step))
    if best == 0:  # the start is no checkpoint of the trainer's
        set_peft_model_state_dict(student, begun)
    if run.is_main:
        save_policy(trainer, run.path / POLICY, card)
        trainer_callback(trainer, CostCallback).flush()
    PartialState().wait_for_everyone()
    steps, log = trainer.state.global_step, trainer.state.log_history
    return Distilled(steps, best, answers, kept, validated[0], validated[best], log)


def build_trainer(
    lesson: Lesson, student: PeftModel, config: DistillationConfig, generation: Mapping[str, Any], run: Run
) -> EnsembleDistillation:
    """The trainer of a student on the lesson's base."""
    ensemble, tokenizer, cost = lesson.ensemble(), lesson.base.tokenizer, CostCallback(run)
    texts = teacher_texts(ensemble, tokenizer, lesson.validation, generation, batch=lesson.batch, seed=config.seed)
    data = lesson.training.as_data()
    options = {"model": student, "args": config, "processing_class": tokenizer, "callbacks": [cost], "train_dataset": data}
    options |= {"eval_dataset": data.select([0])}  # ours validates by texts
    fingerprint, view = base_fingerprint(lesson.base.model), EnsembleTeacher(ensemble)
    trainer = made(EnsembleDistillation, BLOCK, teacher=view, texts=texts, cost=cost, fingerprint=fingerprint, **options)
    trainer.remove_callback(PrinterCallback)
    return trainer
