"""A request on its way through the engine, the texts that it becomes, and what is told to whoever waits for them."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from emorl.serving.token_scores import TokenScore
from emorl.serving.voices import AnyVoice, Sampling
from emorl.serving.writing import Piece, TextWriter


class BusyError(Exception):
    """Nothing more is taken now; later it may be."""


@dataclass(frozen=True, eq=False)
class Asked:
    """What is to be written, and by whom.

    Args:
        prompt: a text or a conversation; what a dynamic ensemble reads.
        ids: the prompt's tokens; what all others read.
        most_tokens: of each text.
        seed: of the first text; the others have the next ones.
        logprobs: how many alternatives each token is told with, beside its own log-probability; None for neither.
        scores_prompt: whether the prompt's tokens are told theirs too.
        strip: whether white space at both ends is left out.
    """

    voice: AnyVoice
    prompt: Any
    ids: tuple[int, ...]
    most_tokens: int
    sampling: Sampling
    seed: int = 0
    samples: int = 1
    stop: tuple[str, ...] = ()
    after: str | None = None
    logprobs: int | None = None
    scores_prompt: bool = False
    strip: bool = False

    @property
    def places(self) -> int:
        """Tokens that each text takes in a cache, at most."""
        return len(self.ids) + self.most_tokens

    @cached_property
    def joins(self) -> bool:
        """Whether it is written beside others."""
        return self.voice.joins

    @property
    def bytes_per_place(self) -> int:
        """Of keys and values that each of these tokens takes, of all policies that are computed."""
        return self.voice.bytes_per_place


@dataclass(frozen=True)
class Written:
    """What a text has become since the last time; `end` says why it ends with it: stop or length."""

    sample: int
    piece: Piece
    tokens: int
    scores: Sequence[TokenScore] = ()
    end: str | None = None


@dataclass(frozen=True)
class PromptScores:
    """Of the prompt's tokens but the first."""

    scores: Sequence[TokenScore]


@dataclass(frozen=True)
class Failed:
    """The request cannot be answered."""

    message: str


Event = Written | PromptScores | Failed


class Job:
    """A request that was taken. Whoever waits no longer sets `is_gone`, which frees its places.

    Args:
        deadline: of `time.monotonic()`, when it is answered with what there is.
    """

    def __init__(self, asked: Asked, deliver: Callable[[Event], None], deadline: float) -> None:
        self.asked, self.deliver, self.deadline = asked, deliver, deadline
        self.is_gone = False

    @property
    def is_over(self) -> bool:
        """Whether nobody waits any more, or has waited long enough."""
        return self.is_gone or time.monotonic() > self.deadline

    def fail(self, error: Exception) -> None:
        """Tells whoever waits, without what only a log should say."""
        self.deliver(Failed(f"the model failed on this request ({type(error).__name__}); the server's log says more"))
        self.is_gone = True


class Text:
    """One of a request's texts in the making."""

    def __init__(self, job: Job, sample: int, tokenizer: PreTrainedTokenizerBase) -> None:
        asked = job.asked
        self.job, self.sample, self.ids = job, sample, list[int]()
        self.has_ended = False
        self._chance = random.Random(asked.seed + sample)
        self._writer = TextWriter(tokenizer, asked.stop, asked.after, asked.strip)

    @property
    def last(self) -> int:
        """Its newest token, which is read next."""
        return self.ids[-1]

    def chance(self) -> float:
        """The uniform number of its next token."""
        return self._chance.random() if self.job.asked.sampling.temperature > 0 else 0.0

    def add(self, token: int, scores: Sequence[TokenScore] = ()) -> None:
        """Its next token, which may be the last one; tells what can be read of it."""
        asked = self.job.asked
        self.ids.append(token)
        is_end = token in asked.sampling.ends
        piece = Piece() if is_end else self._writer.add(token)
        if is_end or self._writer.has_stopped:
            self.end("stop", piece, scores)
        elif len(self.ids) >= asked.most_tokens or time.monotonic() > self.job.deadline:
            self.end("length", piece, scores)
        elif piece != Piece() or scores:
            self.job.deliver(Written(self.sample, piece, len(self.ids), scores))

    def end(self, reason: str, piece: Piece = Piece(), scores: Sequence[TokenScore] = ()) -> None:  # noqa: B008 (frozen)
        last = self._writer.end()
        whole = Piece(piece.text + last.text, piece.reasoning + last.reasoning)
        self.has_ended = True
        self.job.deliver(Written(self.sample, whole, len(self.ids), scores, reason))
