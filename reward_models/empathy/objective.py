"""The empathy objective: one EPITOME mechanism, or all three combined and guarded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from emorl.objectives.models.classifier import Classifier
from emorl.objectives.models.frozen_model import Dtype
from emorl.policies.conversation import completion_text, prompt_text
from emorl.runs.run import read_json
from reward_models.guarded import Guard
from reward_models.linear import LinearModel

MECHANISMS = ("emotional_reaction", "interpretation", "exploration")
LEVELS = {f"{mechanism} of {level} or more": (mechanism, level) for mechanism in MECHANISMS for level in (1, 2)}
"""what the models are trained on: each label is 0 or 1, and an expected rating is the sum of its two"""
COMBINED = "combined"
WEIGHTS = (1.0, 1.0, 0.5)
"""of the ratings in the combined score: any question at all is rated as exploration, and a policy finds that"""
FULL_SUM = 4.0
"""weighted sum of ratings (0 to 2) that scores 1: two strong mechanisms are about as much as one response holds"""
HIGHEST_RATING = 2
CALIBRATION_FILE = "mean_logit.json"


class MeanLogits:
    """Mean logits of the cross-encoder and the linear model, one for each of `LEVELS`.

    Args:
        model: folder that `reward_models.empathy.train` wrote.
        encoder: another place of the linear model's sentence encoder than where it was trained.
        dtype: of the cross-encoder, as in `emorl.objectives.Classifier`.
    """

    def __init__(self, model: str, encoder: str | None = None, dtype: Dtype = "auto") -> None:
        self._classifier = Classifier(model, label=list(LEVELS), dtype=dtype)
        self.batch_tolerance = self._classifier.batch_tolerance
        self._linear = LinearModel(Path(model), encoder)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """(N, 6)."""
        joint = torch.tensor(self._classifier.probabilities(prompts, responses)).logit(eps=1e-6)
        return (joint + self._linear(prompts, responses)) / 2


class Mechanisms:
    """Expected ratings / 2 of the three mechanisms, from calibrated `MeanLogits`; arguments as there."""

    def __init__(self, model: str, encoder: str | None = None, dtype: Dtype = "auto") -> None:
        self._logits = MeanLogits(model, encoder, dtype)
        self.batch_tolerance = self._logits.batch_tolerance
        self._calibration = torch.tensor(read_json(Path(model) / CALIBRATION_FILE))  # (6, 2): slopes, offsets

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """(N, 3) in [0, 1]."""
        slopes, offsets = self._calibration.T
        levels = (self._logits(prompts, responses) * slopes + offsets).sigmoid()  # (N, 6)
        return levels.unflatten(1, (len(MECHANISMS), 2)).mean(2)


class Empathy:
    """Scores in [0, 1]: the expected rating of a mechanism over 2, or (`combined`) the ratings' weighted sum over 4, at most
    1, guarded against sentences that fit everyone.

    Args:
        model: folder that `reward_models.empathy.train` wrote.
        mechanism: emotional_reaction, interpretation, exploration, or combined.
        bank, encoder: as in `Guard`, for `combined`.
        dtype: of the cross-encoder, as in `emorl.objectives.Classifier`.
    """

    range: ClassVar = (0.0, 1.0)

    def __init__(
        self,
        model: str,
        mechanism: str = COMBINED,
        bank: str | None = None,
        encoder: str | None = None,
        dtype: Dtype = "auto",
    ) -> None:
        if mechanism not in (*MECHANISMS, COMBINED):
            raise ValueError(f"empathy: expected mechanism {COMBINED}, {', '.join(MECHANISMS)}; got {mechanism!r}")
        self._mechanisms = Mechanisms(model, encoder, dtype)
        self.batch_tolerance = self._mechanisms.batch_tolerance
        self._column = None if mechanism == COMBINED else MECHANISMS.index(mechanism)
        self._guard = Guard(model, bank, encoder) if mechanism == COMBINED else None

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        if len(completions) == 0:
            return []
        asked, said = [prompt_text(prompt) for prompt in prompts], [completion_text(text) for text in completions]
        shown = self._mechanisms(asked, said)  # (N, 3)
        if self._guard is None:
            return shown[:, self._column].tolist()
        return [combined(row) * guard for row, guard in zip(shown.tolist(), self._guard(asked, said), strict=True)]


def combined(shown: Sequence[float]) -> float:
    """The three mechanisms, each a rating / 2, as one number in [0, 1]."""
    return min(1.0, sum(weight * HIGHEST_RATING * share for weight, share in zip(WEIGHTS, shown, strict=True)) / FULL_SUM)
