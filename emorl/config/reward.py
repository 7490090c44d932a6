"""The files of `emorl train-reward` and `emorl refresh-reward`: frozen dataclasses, so that a wrong one fails before torch
is imported.

The block `training` goes straight to transformers' TrainingArguments (trl's RewardConfig where that trains).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from emorl.config.experiment import Experiment
from emorl.config.yaml import apply_overrides, parse, read_yaml

_strict = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True, config=_strict)
class RewardDataConfig:
    path: str
    """graded responses or pairs: a csv, json, jsonl or parquet file, or a data set's hub id"""
    validation_path: str | None = None
    """a file or hub id of its own for validation"""
    validation: float = Field(default=0.1, gt=0, lt=1)
    """share of the groups kept for early stopping, calibration and the model card, without a file of its own"""
    prompt_column: str | None = "prompt"
    """column with the prompts; none for a model that reads the response alone"""
    response_column: str = "response"
    """column with the responses"""
    labels: list[str] = Field(default_factory=lambda: ["label"])
    """columns with the labels: numbers (regression, one output each), one class name (classification), or one grade
    (ranking, higher is better)"""
    label_range: tuple[float, float] = (0.0, 1.0)
    """lowest and highest label of a regression or ranking; becomes a score of 0 and 1"""
    group_column: str | None = None
    """rows of one group are never split between training and validation, and a ranking compares inside groups; the
    prompt by default"""
    chosen_column: str | None = None
    """pairs instead of graded responses, with `loss: ranking`: column with the better answers, in TRL's formats (texts or
    turns; without a prompt column, whole conversations or texts that begin with the prompt). The four keys before this
    one play no part"""
    rejected_column: str | None = None
    """column with the worse answers"""


@dataclass(frozen=True, config=_strict)
class RewardExperiment:
    output: Path
    """run directory; the trained model is in OUTPUT/model"""
    model: str
    """hub id or folder of any transformers encoder or decoder with safetensors weights"""
    data: RewardDataConfig
    """graded responses, or pairs"""
    loss: Literal["regression", "classification", "ranking"]
    """regression: every label column by binary cross-entropy with the label as target. classification: cross-entropy of one
    class name. ranking: the better of two responses of a group by a margin (PAIR)"""
    description: str = ""
    """one sentence for the model card: what the score means"""
    margin: float = Field(default=3.0, gt=0)
    """ranking: how far apart (in logits) responses of lowest and highest grade shall be; grades between, in proportion"""
    pointwise: float = Field(default=1.0, ge=0)
    """ranking: weight of binary cross-entropy with the grade as target, beside the margin; it makes scores comparable
    between groups. 0 is the margin alone; a decoder is then trained by trl's RewardTrainer"""
    class_weights: Literal["balanced", "none"] = "balanced"
    """classification: rare classes weigh more, so that all weigh the same together"""
    model_options: dict[str, Any] = Field(default_factory=dict)
    """straight to from_pretrained(), such as hidden_dropout_prob or attn_implementation (eager trains faster on CPU)"""
    frozen_layers: int = Field(default=0, ge=0)
    """layers, counted from the input, that stay as they are together with the embeddings: faster, and less is forgotten"""
    max_tokens: int = Field(default=192, ge=8)
    """prompt and response together; the longer of them is cut"""
    group_size: int = Field(default=16, ge=2)
    """ranking: most responses of a group in one step (a pair is a group of two); larger groups are cut into parts"""
    patience: int = Field(default=2, ge=1)
    """stop after this many validations without a lower loss (after calibration, but for rankings); the best checkpoint is
    kept"""
    seed: int = 0
    """seed of the split, of new layers and of the order of batches"""
    training: dict[str, Any] = Field(default_factory=dict)
    """straight to transformers.TrainingArguments (learning_rate, num_train_epochs, per_device_train_batch_size, …)"""

    def __post_init__(self) -> None:
        if not self.data.labels:
            raise ValueError("data.labels: name at least one column")
        if self.loss != "regression" and len(self.data.labels) > 1:
            raise ValueError(f"data.labels: {self.loss} takes one column, got {self.data.labels}")
        if self.data.label_range[0] >= self.data.label_range[1]:
            raise ValueError(f"data.label_range: expected [lowest, highest], got {list(self.data.label_range)}")
        if self.data.chosen_column is not None or self.data.rejected_column is not None:
            _check_pairs(self.data, self.loss)


def _check_pairs(data: RewardDataConfig, loss: str) -> None:
    if None in (data.chosen_column, data.rejected_column) or data.chosen_column == data.rejected_column:
        raise ValueError("data.chosen_column, data.rejected_column: expected two columns, or neither")
    if loss != "ranking":
        raise ValueError(f"loss: pairs (data.chosen_column) are learnt by ranking, got {loss}")
    graded = RewardDataConfig(path=data.path)
    for key in ("response_column", "labels", "label_range", "group_column"):
        if getattr(data, key) != getattr(graded, key):
            raise ValueError(f"data.{key} is of graded responses, data.chosen_column of pairs; leave one of them out")


def load_reward_experiment(path: Path, overrides: Sequence[str] = ()) -> RewardExperiment:
    """The file of one reward model with `dotted.key=value` overrides applied."""
    return parse(RewardExperiment, apply_overrides(read_yaml(path), overrides), str(path))


@dataclass(frozen=True, config=_strict)
class RefreshExperiment:
    reward: RewardExperiment
    """the reward model as it is trained first (a finished run is used as it is)"""
    policy: Experiment
    """experiment with one objective, the reward model's; its option `model` is set in every round. A weak anchor
    (train.grpo.beta) finds more to refuse"""
    rounds: int = Field(default=1, ge=1)
    """how often a policy is trained against the reward model and the reward model refreshed"""
    negatives: int = Field(default=200, ge=1)
    """most rows of each kind that a round adds"""
    retraining: dict[str, Any] = Field(default_factory=dict)
    """replaces keys of reward.training when the reward model goes on, such as fewer epochs and a lower learning rate"""

    def __post_init__(self) -> None:
        if len(self.policy.objectives) != 1:
            raise ValueError(f"policy.objectives: expected the reward model alone, got {sorted(self.policy.objectives)}")
        if self.reward.data.chosen_column is not None:
            raise ValueError("reward.data.chosen_column: a refresh adds graded rows; give graded responses instead of pairs")
        if self.reward.loss == "classification":
            raise ValueError("reward.loss: a refresh needs a lowest grade; use ranking or regression")
        if self.reward.data.prompt_column is None:
            raise ValueError("reward.data.prompt_column: a refresh puts responses under other prompts, so it needs prompts")


def load_refresh_experiment(path: Path, overrides: Sequence[str] = ()) -> RefreshExperiment:
    """The file of one adversarial refresh with `dotted.key=value` overrides applied."""
    return parse(RefreshExperiment, apply_overrides(read_yaml(path), overrides), str(path))
