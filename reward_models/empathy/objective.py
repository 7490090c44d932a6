"""The empathy objective: one EPITOME mechanism, or all three combined and guarded."""

from collections.abc import Sequence
from typing import Any, ClassVar

from emorl.objectives import Classifier
from reward_models.guarded import Guarded

MECHANISMS = ("emotional_reaction", "interpretation", "exploration")


class Empathy:
    """Scores in [0, 1]: the expected rating of a mechanism over 2, or (`combined`) the three ratings' sum over 4, at most 1,
    guarded against sentences that fit everyone.

    Args:
        model: folder that `reward_models.empathy.train` wrote.
        mechanism: emotional_reaction, interpretation, exploration, or combined.
        bank: as in `Guarded`, for `combined`.
    """

    range: ClassVar = (0.0, 1.0)

    def __init__(self, model: str, mechanism: str = "combined", bank: str | None = None) -> None:
        if mechanism not in (*MECHANISMS, "combined"):
            raise ValueError(f"empathy: expected mechanism combined, {', '.join(MECHANISMS)}; got {mechanism!r}")
        if mechanism == "combined":
            self._score: Any = Guarded(model, labels=MECHANISMS, factor=1.5, bank=bank)
        else:
            self._score = Classifier(model, label=mechanism)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return self._score(prompts, completions)
