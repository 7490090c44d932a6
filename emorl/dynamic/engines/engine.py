"""What writes text with several models whose weights may change after every span: the interface of both engines.

`stacked.py` is for LoRA policies of one base, `union.py` for different models with different tokenizers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from emorl.config import UserError, nearest

_DECODING_KEYS = ("max_new_tokens", "do_sample", "temperature", "top_p")

SIGNALS = ("entropy", "top_probability", "disagreement", "stale")
"""What is known of each model where a text ends, all in [0, 1]:

entropy of its next token divided by that of a uniform choice; probability of its most probable next token; Jensen-Shannon
distance, squared and in bits, between its next-token distribution and the mean of all models that were run; 1 where the
model was not run because its weight was 0, and the other three are those of the last time it was.
"""


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen. Greedily at temperature 0; else each text by random numbers of its own seed, so that a batch
    changes none of its texts."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    after: str | None = None
    """the mark behind which answers begin"""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"Got {self}; expected max_new_tokens >= 1, temperature >= 0 and 0 < top_p <= 1.")

    @property
    def generation(self) -> dict[str, Any]:
        """The same in transformers' settings, as `decoding_of` takes them."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p} if self.temperature > 0 else {}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0, **sampling}


def decoding_of(generation: Mapping[str, Any], seed: int, after: str | None = None) -> Decoding:
    """A `Decoding` from transformers' generation settings, and the mark behind which answers begin.

    Raises:
        UserError: a setting that a dynamic ensemble does not know, such as beams.
    """
    for name in generation:
        if name not in _DECODING_KEYS:
            raise UserError(
                f"generation.{name}: a dynamic ensemble decodes greedily or samples; {nearest(name, _DECODING_KEYS)}"
            )
    samples = bool(generation.get("do_sample", False))
    empty = [name for name in ("max_new_tokens", "temperature", "top_p") if name in generation and generation[name] is None]
    if empty:
        raise UserError(f"generation.{empty[0]}: expected a number, got nothing")
    try:
        return Decoding(
            int(generation.get("max_new_tokens", 64)),
            float(generation.get("temperature", 1.0)) if samples else 0.0,
            float(generation.get("top_p", 1.0)) if samples else 1.0,
            seed,
            after,
        )
    except ValueError as error:
        raise UserError(f"generation: {error}") from None


class Writing(Protocol):
    """A batch of B texts in the making, by K models."""

    @property
    def signals(self) -> Tensor:
        """`SIGNALS` of every model where each text ends now, (B, K, 4) in float32 on the CPU. Finished texts keep theirs."""
        ...

    @property
    def states(self) -> Tensor:
        """Each model's last hidden state where each text ends now, (B, K, H) in float32 on the CPU, H the largest of the
        models' (padded with zeros): what they have read, for nothing. Of a model that was not run, and of finished texts,
        the last one known."""
        ...

    @property
    def finished(self) -> Tensor:
        """Which texts ended: with an end token of any model or at max_new_tokens; (B,) of bool on the CPU."""
        ...

    @property
    def texts(self) -> list[str]:
        """What was written so far, without special tokens; complete characters only."""
        ...

    @property
    def tokens(self) -> list[int]:
        """How many tokens each text has so far, its end token included."""
        ...

    def write(self, weights: Tensor, span: int) -> None:
        """Lengthens every unfinished text by `span` tokens, or until it ends, each with its row of `weights` (B, K).

        Weights are at least 0 and sum to 1 in each row. A model whose weight is 0 for a text is not run for it where that
        saves work, and catches up by one prefill when it returns.
        """
        ...


class Engine(Protocol):
    """K models that write together."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the models, in the order of weights and signals."""
        ...

    @property
    def state_width(self) -> int:
        """H of `Writing.states`."""
        ...

    @property
    def device(self) -> torch.device:
        """Where weights are applied, and where an agent had best be."""
        ...

    def begin(self, prompts: Sequence[Any], decoding: Decoding, seeds: Sequence[int] | None = None) -> Writing:
        """Reads prompts (texts, or conversations in TRL's format) with every model; nothing is written yet.

        Args:
            seeds: one for each prompt, added to the decoding's; their positions 0, 1, … by default.
        """
        ...


def check_weights(weights: Tensor, span: int, expected: tuple[int, int]) -> None:
    """Refuses what `Writing.write` cannot take: ValueError."""
    off = (weights.float().sum(-1) - 1).abs().amax() if weights.numel() else torch.tensor(0.0)
    if tuple(weights.shape) != expected or bool((weights < 0).any()) or not float(off) < 1e-3:
        raise ValueError(f"Got weights {weights.tolist()}; expected {expected}, at least 0 and of sum 1 in each row.")
    if span < 1:
        raise ValueError(f"Got span={span}; expected at least one token.")


def distribution_signals(probabilities: Tensor, ran: Tensor | None = None, choices: Tensor | None = None) -> Tensor:
    """The first three of `SIGNALS` for next-token probabilities (A, K, V): (A, K, 3).

    Args:
        ran: (A, K), which models count in the mean that disagreement is measured against; all by default.
        choices: (A, 1), how many tokens there were to choose from, where they are fewer than V.
    """
    share = torch.ones_like(probabilities[..., 0]) if ran is None else ran.to(probabilities)
    mean = torch.einsum("akv,ak->av", probabilities, share / share.sum(-1, keepdim=True))[:, None]  # (A, 1, V)
    entropy, of_mean, of_middle = (torch.special.entr(p).sum(-1) for p in (probabilities, mean, (probabilities + mean) / 2))
    disagreement = (of_middle - (entropy + of_mean) / 2) / math.log(2)  # Jensen-Shannon, in bits
    most = torch.full_like(entropy, probabilities.shape[-1]) if choices is None else choices.to(entropy)
    normalised = entropy / most.clamp_min(2).log()
    return torch.stack([normalised, probabilities.amax(-1), disagreement], -1).clamp(0, 1)
