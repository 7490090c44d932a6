"""What is seen before each span, and what may be answered: the weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from emorl.dynamic.engines.engine import SIGNALS, Writing

PLACES = 16
"""spans whose number the agent sees; all later ones look alike"""
MODEL_FEATURES = len(SIGNALS) + 1
"""per model: its signals and its weight in the last span"""
SHARED_FEATURES = PLACES + 2
"""which span it is (one-hot), share of the tokens that are written, 1 behind the first turn of a conversation"""


@dataclass(frozen=True)
class Situation:
    """A batch of B texts before their next span. `open_` (A,) says which of them are still written, `rows` (B,) which of the
    whole batch they are: of dialogues, some have no such turn."""

    writing: Writing
    prompts: Sequence[Any]
    rows: Tensor
    open_: Tensor
    previous: Tensor  # (B, K) weights of the last span; zeros before the first
    place: int  # how many spans of this turn are written
    turn: int
    max_new_tokens: int

    @property
    def texts(self) -> list[str]:
        """What the open texts say so far."""
        texts = self.writing.texts
        return [texts[row] for row in self.open_.tolist()]

    def features(self) -> tuple[Tensor, Tensor]:
        """Shared features (A, SHARED_FEATURES) and those of every model (A, K, MODEL_FEATURES)."""
        models = torch.cat([self.writing.signals[self.open_], self.previous[self.open_][..., None]], -1)
        shared = torch.zeros(len(self.open_), SHARED_FEATURES)
        shared[:, min(self.place, PLACES - 1)] = 1.0
        written = torch.tensor(self.writing.tokens, dtype=torch.float32)[self.open_]
        shared[:, PLACES], shared[:, PLACES + 1] = written / self.max_new_tokens, float(self.turn > 0)
        return shared, models


class WeightChooser(Protocol):
    """What chooses weights. Called once before each span of a batch."""

    def __call__(self, situation: Situation) -> Tensor:
        """Weights (A, K) of the open texts, at least 0 and summing to 1."""
        ...


@dataclass(frozen=True)
class FixedWeights:
    """The same weights for every span: (K,), or one row for each prompt of the batch."""

    weights: Tensor

    def __call__(self, situation: Situation) -> Tensor:
        """As `WeightChooser.__call__`."""
        if self.weights.ndim == 1:
            return self.weights.expand(len(situation.open_), -1)
        return self.weights[situation.rows[situation.open_]]
