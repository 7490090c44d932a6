"""Objectives that are rules over the completion's words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from emorl.policies.conversation import completion_text


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Runs of n white-space separated words, in lower case."""
    words = text.lower().split()
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def repeated_share(text: str, n: int) -> float:
    """Share of the words that lie in an n-gram which occurred before in the same text."""
    grams = ngrams(text, n)
    first = {gram: place for place, gram in reversed(list(enumerate(grams)))}
    return _covered_share([first[gram] < place for place, gram in enumerate(grams)], n)


def quoted_share(text: str, source: str, n: int) -> float:
    """Share of the words that lie in an n-gram which occurs in `source`."""
    known = set(ngrams(source, n))
    return _covered_share([gram in known for gram in ngrams(text, n)], n)


def _covered_share(marked: Sequence[bool], n: int) -> float:
    """Share of words inside a marked n-gram, of as many words as have these n-grams; 0 for none."""
    covered = {word for place, mark in enumerate(marked) if mark for word in range(place, place + n)}
    return len(covered) / (len(marked) + n - 1) if marked else 0.0


@dataclass(frozen=True)
class Length:
    """1 where the completion has `minimum` to `maximum` words; outside it falls linearly to 0, at no words and at twice
    the maximum."""

    range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    minimum: int = 5
    maximum: int = 40

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= self.maximum or self.maximum == 0:
            raise ValueError(f"length: expected 0 <= minimum <= maximum, got {self.minimum} and {self.maximum}")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return [self._score(len(completion_text(completion).split())) for completion in completions]

    def _score(self, words: int) -> float:
        if words < self.minimum:
            return words / self.minimum
        return 1.0 if words <= self.maximum else max(0.0, 2.0 - words / self.maximum)


@dataclass(frozen=True)
class Repetition:
    """1 - share of word n-grams that repeat an earlier one; 1 where there are fewer than two."""

    range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    n: int = 3

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return [_distinct_share(completion_text(completion), self.n, empty=1.0) for completion in completions]


@dataclass(frozen=True)
class Distinct2:
    """Distinct word bigrams / word bigrams of the completion; 0 where it has no bigram."""

    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return [_distinct_share(completion_text(completion), 2, empty=0.0) for completion in completions]


def _distinct_share(text: str, n: int, empty: float) -> float:
    grams = ngrams(text, n)
    return len(set(grams)) / len(grams) if grams else empty
