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
_READ_CHARACTERS = 5_000  # the end of a text, where its answer is: the time of a reading has a bound


def _exponent(name: str) -> str:
    return rf"(?:\^|\*\*)[ ]?(?:\{{(?P<{name}>[-+]?\d{{1,3}})\}}|(?P<{name}_bare>[-+]?\d{{1,3}})(?!\d))"


_NUMBER = re.compile(
    r"(?<![A-Za-z_\d])(?<!\d\.)(?:"
    r"(?:(?P<whole>\d++)[ \t]++)?(?P<top>\d++)[ \t]?/[ \t]?(?P<bottom>\d++)(?![\d/^]|\.\d|[ \t]?\*\*)"
    r"|(?P<decimal>(?:\d{1,3}(?:[ ]\d{3})++(?![\d,])|\d++(?:,\d++)*+)(?:\.\d++)?|(?<!\.)\.\d++)"
    r"(?:[eE](?P<e>[-+]?\d{1,3})(?!\d)"
    rf"|[ ]?(?:\\times|\\cdot|[×·*x])[ ]?10{_exponent('ten')}"
    rf"|{_exponent('power')})?)"
)
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{2,3})*,\d{3}(?:\.\d+)?")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac(?:\s*\{\s*([-+]?)\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(?P<sign>)(\d)(\d)(?!\d))")
_MIXED = re.compile(r"(?<=\d)(?=\\[dt]?frac|[¼-¾⅐-⅞])")
_DECORATION = re.compile(r"_|\\[,!;]|\\(?=[$%])|\\(?:left|right)\b|\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)|\\text\s*\{\s*\}")
_SPACES = re.compile(r"[^\S\n]+")
_CLAUSE_END = re.compile(r"\n|[.;!?](?=\s|$)")
_SYMBOL = r"(?:\\(?:sqrt|pi|frac|log|ln|sin|cos|tan)|[√π]|[b-hj-z](?![A-Za-z'’]))"
_GOES_ON = re.compile(
    r"[ ]?(?:\\sqrt|\\pi|√|π|\^|\*\*(?=[\w({\\])|!(?=[\d+*/^=])|:\d)|[xyz](?![A-Za-z])"
    rf"|[ ]?(?:\\cdot|\\times|[-+*/×·])[ ]?{_SYMBOL}"
)
_COMES_FROM = re.compile(
    r"(?:(?:[\^√|]|(?<=\d):|[\^}]\{|\\sqrt|\\(?!boxed|text|mathrm|mathbf)[A-Za-z]+(?:\[\d\])?\{)[-+]?"
    r"|(?:(?<![A-Za-z])[b-hj-z]|\\[A-Za-z]+|(?<!\*)[)}π]|\^\d{1,3})[ ]?(?:[-+*/×·]|\\cdot|\\times)[ ]?)[$€£¥]?\Z"
)
_ARITHMETIC = re.compile(r"[ ]?(?:[-+*/×·÷]|\\times|\\cdot|\\div)[ ]?[-+(]?[$€£¥]?\.?\d")
_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{2,}")
_AROUND = re.compile(r"[\s$€£¥%°.,;!?*#(){}\[\]A-Za-z]*")
_LOOK_BACK = 24  # characters before a number that can make it part of something else


@dataclass
class _Read:
    """A number in a text, from `start` to `end`; None for one that is part of an expression, or too long."""

    start: int
    end: int
    value: Fraction | None


def last_number(text: str, markers: Sequence[str] = MARKERS) -> Fraction | None:
    """The number after the last marker that one follows, else the last number of the text; None without a number.

    What follows `</think>` is read, its last 5,000 characters. Reads 1,234.5, 1 000, -3, - 1/2, −$5, 40%, 1 1/2,
    \\frac{-1}{2}, 2e3, 10^3; letters before a digit (`x2`) make no number, nor do parts of an expression with symbols
    (`2\\sqrt{3}`, `x^2+1`). Markers are found in any case; of `answer is 3 + 4 = 7` and `answer is 7 = 3 + 4`, 7 is taken.

    >>> last_number("3 apples and 4 pears: the answer is $1,007. I used 2 steps."), last_number("1/2 of 3, so 1.5")
    (Fraction(1007, 1), Fraction(3, 2))
    """
    plain = _plain(text)
    read = _numbers(plain)
    if not read:
        return None
    places = (match.end() for marker in markers for match in re.finditer(re.escape(marker), plain, re.IGNORECASE))
    if (place := max((place for place in places if place <= read[-1].start), default=None)) is None:
        values = [one.value for one in read if one.value is not None]
        return values[-1] if values else None
    rest = plain[place:].lstrip(" \t\r\n:={$")
    clause = _CLAUSE_END.split(rest, maxsplit=1)[0]
    if found := _numbers(clause):
        results = (number for side in reversed(clause.split("=")) if (number := _result(side)) is not None)
        return next(results, found[0].value if len(found) == 1 else None)
    return _numbers(rest)[0].value


def _plain(text: str) -> str:
    plain = _MIXED.sub(" ", text.rpartition("</think>")[2][-_READ_CHARACTERS:].replace("{,}", ","))
    plain = unicodedata.normalize("NFKC", plain).replace("−", "-").replace("⁄", "/")
    return _SPACES.sub(" ", _LATEX_FRACTION.sub(_as_fraction, _DECORATION.sub("", plain)))


def _as_fraction(match: re.Match[str]) -> str:
    sign, *digits = [part for part in match.groups() if part is not None]
    return f"{sign}{digits[0]}/{digits[1]}"


def _result(side: str) -> Fraction | None:
    """What one side of an equation says; None for a calculation."""
    read = _numbers(side)
    return None if not read or _ARITHMETIC.match(side, read[0].end) else read[0].value


def _numbers(text: str) -> list[_Read]:
    lines = "\n" in text.strip()
    read = []
    for match in _NUMBER.finditer(text):
        before = text[max(0, match.start() - _LOOK_BACK) : match.start()]
        if _COMES_FROM.search(before) or _GOES_ON.match(text, match.end()):
            read.append(_Read(match.start(), match.end(), None))
            continue
        sign = -1 if _is_negative(before, match.start() <= _LOOK_BACK and not lines) else 1
        read += [_Read(match.start(), match.end(), None if value is None else sign * value) for value in _values(match)]
    return read


def _is_negative(before: str, opens: bool) -> bool:
    """Whether a minus stands before a number: close to it and behind no operand, or alone before it.

    Args:
        opens: `before` begins the text, which is one line: no list of items behind dashes.
    """
    rest = before.removesuffix(" ") if before[:-1].endswith("-") else before
    rest = rest.rstrip("$€£¥")
    if not rest.endswith("-"):
        return False
    left = rest[:-1].rstrip("$€£¥") if before == rest or before[-1] in "$€£¥" else rest[:-1]
    if before.endswith("- "):
        left = left.rstrip()
        return left.endswith(("=", "(", ":", "[", "{")) or (not left and opens)
    return not left or not (left[-1].isalnum() or left[-1] in ")]_-")


def _values(match: re.Match[str]) -> list[Fraction | None]:
    """The number, or those of a list without blanks (`2,3`)."""
    if len(match.group()) > _LONGEST or (match["bottom"] and not int(match["bottom"])):
        return [None]
    if match["bottom"]:
        return [int(match["whole"] or 0) + Fraction(int(match["top"]), int(match["bottom"]))]
    digits = match["decimal"].replace(" ", "")
    if "," in digits and not _THOUSANDS.fullmatch(digits):
        return [Fraction(part) for part in digits.split(",")]
    number = Fraction(digits.replace(",", ""))
    tens = match["e"] or match["ten"] or match["ten_bare"]
    power = match["power"] or match["power_bare"]
    if power and (len(digits) > 20 or (number == 0 and int(power) < 0)):
        return [None]
    return [number * Fraction(10) ** int(tens) if tens else number ** int(power) if power else number]


def reference_number(text: str, markers: Sequence[str] = MARKERS) -> Fraction | None:
    """The number that a reference says; None where it says another thing: a formula has to be one number and no more."""
    plain = _plain(text)
    has_marker = any(marker.lower() in plain.lower() for marker in markers)
    if not has_marker and not _WORD.search(plain):
        side = plain.rpartition("=")[2]
        read = _numbers(side)
        around = "".join((side[: read[0].start].rstrip(" -+$€£¥"), side[read[-1].end :])) if read else "?"
        if len(read) != 1 or not _AROUND.fullmatch(around):
            return None
        return _numbers(side.strip())[0].value
    return last_number(text, markers)


@dataclass(config=ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False))
class NumericAnswer:
    """1 where the number that the completion ends on is the reference's, else 0: also without a number.

    The number after a marker such as `####` or `answer is` counts, in the completion and in the reference (GSM8K's solutions
    end on `#### 42`); without a marker, the last one. Numbers are compared exactly, as fractions: 0.5 is 1/2, 3.33 is not
    10/3; 50% is 50. A reference that is a formula but no number (`2\\sqrt{3}`, `x^2+1`) is refused.

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
            number = reference_number(value, self.markers)
        elif isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
            number = Fraction(str(value))
        if number is None:
            raise UserError(
                f"numeric_answer: completion {row} has {value!r:.60} in column {self.answer_column!r}; expected a number, or a "
                "text with one"
            )
        return number
