"""An engine without language models, whose best weights are known: they depend on the prompt and on the span."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emorl.dynamic.engines.engine import Decoding


@dataclass(frozen=True)
class ToyEngine:
    """A prompt is a digit d. In span s the model (d + s) % K is right; each span writes the letter of the model with the
    largest weight. What the models signal of themselves is the prompt's code, so an agent can know which prompt it is."""

    names: tuple[str, ...] = ("a", "b", "c")
    state_width: int = 2

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def begin(self, prompts: Sequence[Any], decoding: Decoding, seeds: Sequence[int] | None = None) -> "ToyWriting":
        return ToyWriting([int(prompt[-1]["content"] if not isinstance(prompt, str) else prompt) for prompt in prompts],
                          len(self.names), decoding.max_new_tokens)  # fmt: skip

    def right(self, prompt: str, spans: int) -> str:
        return "".join(self.names[(int(prompt) + place) % len(self.names)] for place in range(spans))


class ToyWriting:
    def __init__(self, digits: Sequence[int], models: int, length: int) -> None:
        self.digits, self.models, self.length = digits, models, length
        self.texts = [""] * len(digits)

    @property
    def signals(self) -> Tensor:
        found = torch.zeros(len(self.digits), self.models, 4)
        for row, digit in enumerate(self.digits):
            found[row, digit % self.models, 0] = 1.0
        return found

    @property
    def states(self) -> Tensor:
        return torch.zeros(len(self.digits), self.models, 2)

    @property
    def finished(self) -> Tensor:
        return torch.tensor([len(text) >= self.length for text in self.texts])

    @property
    def tokens(self) -> list[int]:
        return [len(text) for text in self.texts]

    def write(self, weights: Tensor, span: int) -> None:
        best = weights.argmax(1).tolist()
        self.texts = [text + "abcdef"[model] for text, model in zip(self.texts, best, strict=True)]
