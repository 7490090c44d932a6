"""The number that a text ends on, against the reference's: answers of GSM8K (Cobbe et al. 2021, arXiv 2110.14168) and alike."""

import math
import numbers
import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from emorl.config import UserError
from emorl.objectives.rules.columns import column
from emorl.policies.conversation import completion_text

MARKERS = ("####", "answer is", "answer:", "\\boxed")

_LONGEST = 300  # characters of a number: more is noise, and slow
_DIGITS = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?![\d,]*\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+"
_NUMBER = re.compile(
    r"(?<![A-Za-z_\d])(?<!\d\.)(?P<sign>(?<![\d)\]])[-+])?[$€£¥]?(?P<second>(?<![-+])[-+])?"
    r"(?:(?:(?P<whole>\d+)[ \t]+)?(?P<top>\d+)[ \t]?/[ \t]?(?P<bottom>\d+)(?![\d/.])"
    rf"|(?P<decimal>{_DIGITS})(?P<power>[eE][-+]?\d{{1,3}}(?!\d))?)"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_MIXED = re.compile(r"(?<=\d)(?=\\[dt]?frac|[¼-¾⅐-⅞])")
_DECORATION = re.compile(r"_|\\[,!;]|\\(?=[$%])")
_CLAUSE_END = re.compile(r"\n|[.;!?](?=\s|$)")


def last_number(text: str, markers: Sequence[str] = MARKERS) -> Fraction | None:
    """The number after the last marker that one follows, else the last number of the text; None without a number.

    What follows `</think>` is read. Reads 1,234.5, -3, −$5, 40%, 1/2, 1 1/2, \\frac{1}{2}, 2e3; letters before a digit (`x2`)
    make no number. Markers are found in any case; of `answer is 3 + 4 = 7`, 7 is taken.

    >>> last_number("3 apples and 4 pears: the answer is $1,007. I used 2 steps."), last_number("1/2 of 3, so 1.5")
    (Fraction(1007, 1), Fraction(3, 2))
    """
    plain = _MIXED.sub(" ", text.rpartition("</think>")[2].replace("{,}", ","))
    plain = unicodedata.normalize("NFKC", plain).replace("−", "-").replace("⁄", "/")
    plain = _LATEX_FRACTION.sub(r"\1/\2", _DECORATION.sub("", plain))
    places = {match.end() for marker in markers for match in re.finditer(re.escape(marker), plain, re.IGNORECASE)}
    for place in sorted(places, reverse=True):
        rest = plain[place:].lstrip(" \t\r\n:={$")
        clause = _CLAUSE_END.split(rest, maxsplit=1)[0]
        if marked := _numbers(clause.rpartition("=")[2]) or _numbers(clause) or _numbers(rest):
            return marked[0]
    values = _numbers(plain)
    return values[-1] if values else None


def _numbers(text: str) -> list[Fraction]:
    return [value for match in _NUMBER.finditer(text) if (value := _value(match)) is not None]


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match.group()) > _LONGEST or (match["bottom"] and not int(match["bottom"])):
        return None
    if match["bottom"]:
        value = int(match["whole"] or 0) + Fraction(int(match["top"]), int(match["bottom"]))
    else:
        value = Fraction(match["decimal"].replace(",", "") + (match["power"] or ""))
    return -value if "-" in (match["sign"], match["second"]) else value


@dataclass(config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class NumericAnswer:
    """1 where the number that the completion ends on is the reference's, else 0: also without a number.

    The number after a marker such as `####` or `answer is` counts, in the completion and in the reference (GSM8K's solutions
    end on `#### 42`); without a marker, the last one. Numbers are compared exactly, as fractions: 0.5 is 1/2, 3.33 is not
    10/3; 50% is 50.

    >>> NumericAnswer(answer_column="answer")(["…"] * 2, ["6 * 7 = 42.", "42 or 43"], answer=["6 * 7. #### 42"] * 2)
    [1.0, 0.0]
    """

    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    answer_column: str
    """the data set's column with the reference: a number, or a text with one"""
    tolerance: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """largest difference from the reference that is right"""
    markers: tuple[str, ...] = MARKERS
    """texts that an answer follows, in any case; [] reads the last number"""

    def __post_init__(self) -> None:
        if not all(marker.strip() for marker in self.markers):
            raise ValueError(f"numeric_answer: expected markers with text, got {list(self.markers)}")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        values = column(columns, self.answer_column, "numeric_answer", "answer_column")
        right = [self._right_number(value, row) for row, value in enumerate(values)]
        answers = [last_number(completion_text(completion), self.markers) for completion in completions]
        tolerance = Fraction(str(self.tolerance))
        pairs = zip(answers, right, strict=True)
        return [float(answer is not None and abs(answer - wanted) <= tolerance) for answer, wanted in pairs]

    def _right_number(self, value: Any, row: int) -> Fraction:
        number = None
        if isinstance(value, str):
            number = last_number(value, self.markers)
        elif isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
            number = Fraction(str(value))
        if number is None:
            raise UserError(
                f"numeric_answer: completion {row} has {value!r:.60} in column {self.answer_column!r}; expected a number, or a "
                "text with one"
            )
        return number
