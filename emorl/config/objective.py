"""One of the `objectives`: a reward function, pairs that people made, or both."""

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from emorl.config.objects import TextOrObject, short_form
from emorl.config.train import Method

_strict = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True, config=_strict)
class TransformConfig:
    range: tuple[float, float] | None = None
    """lowest and highest raw score, which become 0 and 1; by default what the objective's function declares"""
    mean: float | None = None
    """instead of a range, where there is none (a reward model's logit): score = logistic((raw score - mean) / std)"""
    std: float | None = Field(default=None, gt=0)
    """goes with mean"""
    clip: tuple[float, float] | None = None
    """scores are cut to these: [0, 1] by default, [0.0001, 0.9999] with log (paper)"""
    log: bool = False
    """training maximises log(score) (paper's reward); validation, search, evaluation and report show the score itself"""

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together")
        if self.range is not None and self.mean is not None:
            raise ValueError("give either a range, or mean and std")
        if self.range is not None and self.range[0] >= self.range[1]:
            raise ValueError(f"range: expected two numbers, the lower first, got {list(self.range)}")
        if self.clip is not None and not 0 <= self.clip[0] < self.clip[1] <= 1:
            raise ValueError(f"clip: expected two numbers in [0, 1], the lower first, got {list(self.clip)}")
        if self.log and self.clip is not None and self.clip[0] == 0:
            raise ValueError("clip must begin above 0 where log is on: log(0) is no reward")


@dataclass(frozen=True, config=_strict)
class PairsConfig:
    path: TextOrObject
    """pairs that people made: a csv, json, jsonl or parquet file, a data set's hub id, in Python also a `datasets.Dataset`, in
    TRL's formats: texts or conversations, the prompt in a column of its own or at the start of both. `pairs: X` alone is short
    for it"""
    split: str = "train"
    """split of a hub data set"""
    validation_path: TextOrObject | None = None
    """a file or hub id of its own for the pairs that are not trained on"""
    validation: float = Field(default=0.1, gt=0, lt=1)
    """share of the prompts whose pairs are not trained on, without a file of its own: the policy's accuracy on them is reported
    and chooses the checkpoint"""
    prompt_column: str = "prompt"
    """column with the prompts"""
    chosen_column: str = "chosen"
    """column with the better answer of each pair"""
    rejected_column: str = "rejected"
    """column with the worse one"""
    grade_column: str | None = None
    """for a file of graded answers instead, one a row: the column with the grade, higher is better. The answers to one prompt
    become pairs"""
    response_column: str = "response"
    """with grade_column: the column with the answers"""
    choose: Literal["best_worst", "all"] = "all"
    """with grade_column: the best answer of a prompt against its worst, or all that differ enough"""
    margin: float = Field(default=0.0, ge=0)
    """with grade_column: how much higher the chosen answer's grade must be"""
    length_ratio: float | None = Field(default=None, ge=1)
    """only pairs whose longer answer has at most so many times the words of the shorter one"""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return value if isinstance(value, cls) else short_form("path", value)


_FIELDS = ("function", "options", "transform", "pairs", "method")


@dataclass(frozen=True, config=_strict)
class ObjectiveConfig:
    function: TextOrObject | None = None
    """registry name (classifier, likelihood, length, …), hub id of a sequence classifier, or package.module:attribute; in
    Python also a reward function or class itself"""
    options: dict[str, Any] = Field(default_factory=dict)
    """options of that function; may be written beside `function` directly (ones called `transform`, `pairs` or `method` only
    here)"""
    transform: TransformConfig | None = None
    """from the function's raw score to a score in [0, 1]; without it, the range that the function declares is mapped onto
    [0, 1], and the scores of a function that declares none stay as they are"""
    pairs: PairsConfig | None = None
    """pairs that people made, which the policy is trained on (by dpo). Such an objective needs a function only where answers
    are scored, in search, evaluate and compare; `emorl train-reward` makes one of the same pairs"""
    method: Method | None = None
    """how this objective's policy is trained; by default dpo where it has pairs, else as train.method says"""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        """`reflection: package.module:f` (or a callable) and options written beside `function`."""
        value = value if isinstance(value, cls) else short_form("function", value)
        content = value if isinstance(value, dict) else dict(getattr(value, "kwargs", None) or {})
        options = {k: v for k, v in content.items() if k not in _FIELDS}
        return {**{k: content.get(k) for k in _FIELDS}, "options": options | (content.get("options") or {})}

    def __post_init__(self) -> None:
        if self.function is None and self.pairs is None:
            raise ValueError("name a function that scores answers, or a file of pairs")
        if self.function is None and self.options:
            raise ValueError(f"{next(iter(self.options))!r} is an option of a function, and there is none")
        if self.pairs is not None and self.method not in (None, "dpo"):
            raise ValueError(f"pairs are trained on by dpo, not by {self.method}; leave out method or pairs")
