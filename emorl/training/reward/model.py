"""Reward-model stage: any transformers encoder or decoder learns to score responses (`emorl train-reward`).

Prompt and response are encoded jointly. Losses: binary cross-entropy on graded labels, cross-entropy on classes, or the
pairwise margin of PAIR (Min et al., EMNLP 2022), to which binary cross-entropy is added by default, because a margin inside
groups alone says nothing about scores of different prompts. A decoder with the margin alone goes through trl's
RewardTrainer (its logistic margin), everything else through transformers' Trainer. The checkpoint with the lowest
validation loss is kept (without a margin: the loss after calibration) and its logits are calibrated on the validation
rows, so that the registered objective `classifier` gives scores in [0, 1] that mean what the labels mean.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification,
    EarlyStoppingCallback,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from trl import RewardConfig, RewardTrainer

from emorl.config import UserError
from emorl.config.library import library_settings
from emorl.config.reward import RewardExperiment
from emorl.objectives.models.joint_encoding import encode_jointly
from emorl.policies.loading import read_config, read_model, read_tokenizer
from emorl.runs.layout import CHECKPOINTS, MODEL
from emorl.runs.progress import Bar, Progress
from emorl.runs.results import RewardResult
from emorl.runs.run import Run, read_json
from emorl.training.callbacks import CostCallback
from emorl.training.checkpoints import last_complete_checkpoint
from emorl.training.rehearsal import check_reporters
from emorl.training.reward.calibration import calibrate, calibrated, calibrated_loss
from emorl.training.reward.card import measure, save_model
from emorl.training.reward.data import Graded, GradedData, compared

_SET_BY_EMORL = ("output_dir", "seed", "load_best_model_at_end", "metric_for_best_model", "greater_is_better")


def train_model(
    experiment: RewardExperiment, data: GradedData, arguments: TrainingArguments, run: Run, progress: Progress
) -> RewardResult:
    """Trains from the last complete checkpoint to the end, calibrates, measures, writes model and card to `model/`."""
    spent = _SecondsCallback(run)
    progress.say(
        f"reward model: {len(data.training)} rows to train on, {len(data.validation)} to validate, of {experiment.model}"
    )
    model, tokenizer = _load(experiment, data.names)
    trainer = _trainer(experiment, data, model, tokenizer, arguments)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(EarlyStoppingCallback(experiment.patience))
    checkpoint = last_complete_checkpoint(run.path / CHECKPOINTS)
    steps = int(arguments.num_train_epochs * len(trainer.get_train_dataloader()) / arguments.gradient_accumulation_steps)
    steps = arguments.max_steps if arguments.max_steps > 0 else steps
    with progress.bar("train reward model", steps) as bar:
        trainer.add_callback(_BarCallback(bar))
        trainer.add_callback(spent)
        trainer.train(resume_from_checkpoint=checkpoint)
    model.eval()
    targets = torch.tensor([row.targets for row in data.validation])  # (N, outputs)
    logits = predict(model, tokenizer, data.validation)
    model.config.calibration = calibrate(logits, targets, joint=experiment.loss == "classification")
    figures = measure(experiment, data, calibrated(logits, model.config.calibration, experiment.loss))
    spent.flush()
    seconds = read_json(run.cost_path)["seconds"]
    save_model(model, tokenizer, run.path / MODEL, experiment, data, figures, seconds)
    progress.say(f"reward model: {run.path / MODEL}, {seconds:.0f} s")
    return RewardResult(figures, trainer.state.log_history)


def training_arguments(experiment: RewardExperiment) -> TrainingArguments:
    """The `training:` block as TrainingArguments (RewardConfig for trl), with our defaults for what it leaves out."""
    pairwise = _is_pairwise(experiment)
    kind = RewardConfig if pairwise else TrainingArguments
    for key in _SET_BY_EMORL:
        if key in experiment.training:
            raise UserError(f"training.{key} is set by emorl; the checkpoint with the lowest validation loss is kept")
    owner = f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
    defaults = {
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "num_train_epochs": 4,
        "per_device_train_batch_size": 4 if experiment.loss == "ranking" else 32,  # groups of up to group_size; rows
        "per_device_eval_batch_size": 8 if experiment.loss == "ranking" else 64,
        "weight_decay": 0.01,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "logging_steps": 10,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_bf16_supported() if torch.cuda.is_available() else torch.cpu._is_amx_tile_supported(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        **({"gradient_checkpointing": False} if pairwise else {}),  # trl's default is True
    }
    fixed = {
        "output_dir": str(experiment.output / CHECKPOINTS),
        "seed": experiment.seed,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss" if experiment.loss == "ranking" else "eval_calibrated_loss",
        "greater_is_better": False,
        "remove_unused_columns": False,
        "label_names": ["targets"],
    }
    arguments = library_settings(kind, experiment.training, "training", owner, defaults, fixed)
    check_reporters(arguments, "training")
    return arguments


def _is_pairwise(experiment: RewardExperiment) -> bool:
    """Whether trl's RewardTrainer does the training."""
    if experiment.loss != "ranking" or experiment.pointwise > 0:
        return False
    kind = type(read_config(experiment.model, "model"))
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING


def _load(experiment: RewardExperiment, names: Sequence[str]) -> tuple[Any, Any]:
    problem = "single_label_classification" if experiment.loss == "classification" else "multi_label_classification"
    torch.manual_seed(experiment.seed)  # of the new head
    tokenizer = read_tokenizer(experiment.model, "model")
    model = read_model(
        AutoModelForSequenceClassification,
        experiment.model,
        "model",
        is_new=_is_head,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        problem_type=problem,
        **{"dtype": torch.float32, **experiment.model_options},
    )
    model.requires_grad_(True)
    if experiment.frozen_layers:
        _freeze_in_place(model, experiment.frozen_layers)
    tokenizer.model_max_length = experiment.max_tokens
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id  # a decoder's last token is the last that is not padding
    return model, tokenizer


def _is_head(model: Any, tensor: str) -> bool:
    """What stands behind the language model: a reward model may begin as one, or as another reward model."""
    return not tensor.startswith(f"{model.base_model_prefix}.") or "pooler." in tensor


def _freeze_in_place(model: Any, layers: int) -> None:
    """Embeddings and the first `layers` layers no longer learn."""
    stack = max((module for module in model.modules() if isinstance(module, torch.nn.ModuleList)), key=len)
    if layers > len(stack):
        raise UserError(f"frozen_layers is {layers}, but the model has {len(stack)} layers")
    for module in (model.get_input_embeddings(), *stack[:layers]):
        module.requires_grad_(False)


def _trainer(
    experiment: RewardExperiment, data: GradedData, model: Any, tokenizer: Any, arguments: TrainingArguments
) -> Trainer:
    if isinstance(arguments, RewardConfig):
        train, validation = (_chosen_rejected(experiment, tokenizer, rows) for rows in (data.training, data.validation))
        return RewardTrainer(model, arguments, train_dataset=train, eval_dataset=validation, processing_class=tokenizer)
    size = experiment.group_size if experiment.loss == "ranking" else 1
    lists = [
        compared(rows, size, experiment.seed) if size > 1 else [[row] for row in rows]
        for rows in (data.training, data.validation)
    ]
    trainer = RewardModelTrainer(
        experiment=experiment,
        class_weights=_class_weights(experiment, data),
        model=model,
        args=arguments,
        train_dataset=lists[0],  # type: ignore[arg-type]
        eval_dataset=lists[1],  # type: ignore[arg-type]
        data_collator=partial(_collate, tokenizer),
        compute_metrics=None if experiment.loss == "ranking" else partial(_metrics, experiment.loss == "classification"),
    )
    trainer.model_accepts_loss_kwargs = False  # the loss is a mean over the batch: accumulation must divide it
    return trainer


def _class_weights(experiment: RewardExperiment, data: GradedData) -> Tensor | None:
    """(classes,): rows / (classes x rows of the class)."""
    if experiment.loss != "classification" or experiment.class_weights == "none":
        return None
    counts = torch.tensor([row.targets for row in data.training]).sum(0)
    return len(data.training) / (len(data.names) * counts.clamp(min=1))


def _collate(tokenizer: Any, lists: Sequence[Sequence[Graded]]) -> dict[str, Any]:
    rows = [row for rows in lists for row in rows]
    return {
        **_encode(tokenizer, rows),
        "targets": torch.tensor([row.targets for row in rows]),  # (B, outputs)
        "group": torch.tensor([number for number, rows in enumerate(lists) for _ in rows]),  # (B,)
    }


def _encode(tokenizer: Any, rows: Sequence[Graded]) -> Any:
    prompts = [row.prompt for row in rows if row.prompt is not None]
    return encode_jointly(tokenizer, [row.response for row in rows], prompts or None)


def _metrics(joint: bool, predicted: EvalPrediction) -> dict[str, float]:
    logits, targets = (torch.as_tensor(values).float() for values in (predicted.predictions, predicted.label_ids))
    return {"calibrated_loss": calibrated_loss(logits, targets, joint)}


class RewardModelTrainer(Trainer):
    """Trainer with the loss of the experiment."""

    def __init__(self, *, experiment: RewardExperiment, class_weights: Tensor | None, **options: Any) -> None:
        super().__init__(**options)
        self._experiment, self._class_weights = experiment, class_weights

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        tokens = {key: value for key, value in inputs.items() if key not in ("targets", "group")}
        outputs = model(**tokens)
        logits, targets, experiment = outputs.logits.float(), inputs["targets"], self._experiment
        if experiment.loss == "classification":
            weights = None if self._class_weights is None else self._class_weights.to(logits.device)
            loss = functional.cross_entropy(logits, targets.argmax(1), weights)
        else:
            loss = functional.binary_cross_entropy_with_logits(logits, targets)
        if experiment.loss == "ranking":
            loss = experiment.pointwise * loss + margin_loss(logits[:, 0], targets[:, 0], inputs["group"], experiment.margin)
        return (loss, outputs) if return_outputs else loss


def margin_loss(scores: Tensor, grades: Tensor, group: Tensor, margin: float) -> Tensor:
    """Mean of max(0, margin * (g_i - g_j) - (s_i - s_j)) over pairs of one group with g_i > g_j; 0 without such pairs.

    PAIR's pairwise margin loss (Min et al. 2022, §4); all arguments but `margin` are (B,), grades in [0, 1].
    """
    gap = grades[:, None] - grades[None]  # (B, B)
    pairs = (gap > 0) & (group[:, None] == group[None])
    short = torch.relu(margin * gap - (scores[:, None] - scores[None]))
    return short[pairs].sum() / pairs.sum().clamp(min=1)


def _chosen_rejected(experiment: RewardExperiment, tokenizer: Any, rows: Sequence[Graded]) -> Dataset:
    """Every ordered pair of a list as trl's RewardTrainer reads it."""
    pairs = [
        (better, worse, experiment.margin * (better.targets[0] - worse.targets[0]))
        for group in compared(rows, experiment.group_size, experiment.seed)
        for better in group
        for worse in group
        if better.targets[0] > worse.targets[0]
    ]
    if not pairs:
        raise UserError(f"{experiment.data.path}: no group has two different grades; a ranking compares inside groups")

    def ids(row: Graded) -> list[int]:
        return _encode(tokenizer, [row])["input_ids"][0].tolist()

    return Dataset.from_dict(
        {
            "chosen_ids": [ids(better) for better, _, _ in pairs],
            "rejected_ids": [ids(worse) for _, worse, _ in pairs],
            "margin": [margin for *_, margin in pairs],
        }
    )


@torch.no_grad()
def predict(model: Any, tokenizer: Any, rows: Sequence[Graded], batch_size: int = 64) -> Tensor:
    """Logits (N, outputs) of the rows, in batches of similar length."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].prompt or "") + len(rows[index].response))
    logits = torch.zeros(len(rows), model.config.num_labels)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        inputs = _encode(tokenizer, [rows[index] for index in part]).to(model.device)
        logits[part] = model(**inputs).logits.float().cpu()
    return logits


class _BarCallback(TrainerCallback):
    """Moves the bar with the newest losses."""

    def __init__(self, bar: Bar) -> None:
        self._bar, self._shown, self._validation = bar, 0, float("nan")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:  # fmt: skip
        self._validation = (logs or {}).get("eval_loss", self._validation)
        if logs and "loss" in logs:
            note = f"loss {float(logs['loss']):.3f}  validation {self._validation:.3f}"
            self._bar.advance(state.global_step - self._shown, note)
            self._shown = state.global_step


class _SecondsCallback(CostCallback):
    """Counts the time alone: a reward model's validation generates nothing."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:  # fmt: skip
        self.flush()
