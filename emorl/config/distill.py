"""The block `distill` of an experiment: one adapter that holds the ensemble, at chosen weights or at any."""

from typing import Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_strict = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

SOUP, BASE = "soup", "base"
NUMBERS, WORDS = "{weights}", "{words}"
"""places in `line` for the weights: as percents, or as names repeated"""


@dataclass(frozen=True, config=_strict)
class DistillConfig:
    weights: dict[str, float] = Field(default_factory=dict)
    """of the policies, by name, to be divided by their sum; by default those that suit `prefer`, else the best that the search
    found"""
    prefer: dict[str, float] = Field(default_factory=dict)
    """objective -> importance: the point of the search's front that suits it best"""
    front: bool = False
    """one adapter for all weights: it reads them in a line of the prompt, which `emorl generate --prefer` puts in"""
    start: str = SOUP
    """what the adapter is before its first step: soup (the policies' weighted sum, cut to the rank), base, or a policy's
    name"""
    line: str = "Priorities: {weights}."
    """with `front`, what the adapter reads; {weights} becomes such as `helpful 70 %, brief 30 %`. {words} instead becomes each
    name as often as its share of 20 words, which small models read better than numbers"""
    held_out: int = Field(default=6, ge=0)
    """with `front`, preferences that are never trained on, nor any near them, and are reported apart"""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """straight to trl.DistillationConfig (learning_rate, max_steps, beta, temperature, eval_steps, …)"""

    def __post_init__(self) -> None:
        if bool(self.weights) + bool(self.prefer) + self.front > 1:
            raise ValueError("weights and prefer choose one trade-off, front is for all of them: give one of the three")
        if self.weights and (min(self.weights.values()) < 0 or sum(self.weights.values()) == 0):
            raise ValueError(f"weights must not be negative and not all 0, got {self.weights}")
        places, rest = self.line.count(NUMBERS) + self.line.count(WORDS), self.line.replace(NUMBERS, "").replace(WORDS, "")
        if places != 1 or {"{", "}"} & set(rest):
            raise ValueError(f"line must hold {NUMBERS} or {WORDS} once and no other braces, such as 'Priorities: {NUMBERS}.'")
