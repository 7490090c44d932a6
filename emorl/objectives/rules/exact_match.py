"""Exact match with a reference after normalisation, as SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250) and TriviaQA (Joshi et
al. 2017, arXiv 1705.03551) score answers.

Departures: text is NFKC and case-folded; marks inside numbers stay, so that 1.5 is not 15 and -5 is not 5; what
normalisation would leave empty keeps its marks and articles, so that the answer "A" is not silence.
"""

import functools
import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from emorl.objectives.rules.columns import column, texts
from emorl.policies.conversation import completion_text

_IN_NUMBER = re.compile(r"(?<=\d)[.:/](?=\d)|(?<!\w)-(?=[$€£]?\.?\d)|(?<![\w.])\.(?=\d)")
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normalised(text: str, case: bool = True, punctuation: bool = True, articles: bool = True) -> str:
    """The text with single spaces, in lower case, without punctuation and English articles, each unless switched off.

    >>> normalised("The  Beatles!"), normalised("-1,500.5"), normalised("A")
    ('beatles', '-1500.5', 'a')
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).replace("−", "-").split())
    plain = bare = plain.casefold() if case else plain
    if punctuation:
        kept = {match.start() for match in _IN_NUMBER.finditer(bare)}
        bare = "".join(mark for place, mark in enumerate(bare) if place in kept or not _is_punctuation(mark))
    if articles:
        bare = _ARTICLE.sub(" ", bare)
    return " ".join(bare.split()) or plain


@functools.cache
def _is_punctuation(mark: str) -> bool:
    return mark in string.punctuation or unicodedata.category(mark).startswith("P")


@dataclass(config=ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False))
class ExactMatch:
    """1 where the completion is the reference, or one of several accepted ones, after normalisation, else 0; with
    `separator`, the share of the reference's parts that stand at their place.

    What follows `</think>` is read. A completion without text scores 0. `match: contains` also pays a completion that
    lists many answers: bound its length beside it.

    >>> ExactMatch(answer_column="answer")(["…"] * 2, ["The Beatles.", "Queen"], answer=["Beatles", ["Abba", "queen"]])
    [1.0, 1.0]
    >>> ExactMatch(answer_column="answer", separator=";")(["…"], ["19; 35; cba"], answer=["19; 36; cba"])
    [0.6666666666666666]
    """

    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    answer_column: str
    """the data set's column with the reference: a text, or a list of accepted texts"""
    match: Literal["whole", "last_line", "contains"] = "whole"
    """what has to be the reference: the completion, its last line with text, or a run of its words"""
    separator: str | None = None
    """between parts, such as ";": the score is then right parts / reference parts, compared position by position"""
    ignore_case: bool = True
    """compare case-folded"""
    ignore_punctuation: bool = True
    """compare without punctuation, except a point, colon, slash or minus sign that belongs to a number"""
    ignore_articles: bool = True
    """compare without a, an, the"""

    def __post_init__(self) -> None:
        if self.separator is not None and not self.separator.strip():
            raise ValueError(f"exact_match: expected a separator with a mark, such as ';', got {self.separator!r}")
        if self.separator is not None and self.match == "contains":
            raise ValueError("exact_match: `separator` compares parts at their places; use it with match: whole or last_line")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        values = column(columns, self.answer_column, "exact_match", "answer_column")
        accepted = [texts(value, "exact_match", self.answer_column, row) for row, value in enumerate(values)]
        read = [self._read(completion_text(completion)) for completion in completions]
        return [
            max(self._score(text, reference) for reference in several) for text, several in zip(read, accepted, strict=True)
        ]

    def _read(self, text: str) -> str:
        text = text.rpartition("</think>")[2].strip()
        return text.splitlines()[-1] if self.match == "last_line" and text else text

    def _score(self, text: str, reference: str) -> float:
        if self.separator is None:
            answer, wanted = self._normalised(text), self._normalised(reference)
            return float(f" {wanted} " in f" {answer} " if self.match == "contains" else answer == wanted)
        parts, wanted_parts = (
            [self._normalised(part) for part in side.strip().removesuffix(self.separator).split(self.separator)]
            for side in (text, reference)
        )
        right = sum(part == wanted != "" for part, wanted in zip(parts, wanted_parts, strict=False))
        return right / len(wanted_parts)

    def _normalised(self, text: str) -> str:
        return normalised(text, self.ignore_case, self.ignore_punctuation, self.ignore_articles)
