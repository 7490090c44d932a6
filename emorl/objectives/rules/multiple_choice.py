"""Exact-match accuracy on multiple-choice questions, from the one letter that a completion settles on."""

import numbers
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from emorl.config import UserError
from emorl.objectives.rules.columns import column
from emorl.policies.conversation import completion_text

_READ_CHARACTERS = 20_000  # the end of a text: the time of a reading has a bound
_LETTERS = "ABCDEFGHIJ"

# A capital that stands alone: no part of a word, `B-cell`, `A+` or `D.C.`, and not the word in `A dog`, `I think`.
_VERBS = "is|isn|are|was|would|should|could|can|must|seems|because|since|as|and|or|but|over"
_WORD = rf"(?:(?<=I)|(?<=A)(?<![a-z,] A))[ \t]+(?!(?:{_VERBS})\b)[A-Z]?[a-z]"
_LETTER = rf"(?<![A-Za-z0-9'’])(?<![A-Za-z][.-])[A-J](?![A-Za-z0-9'’+#]|-[A-Za-z]|\.[A-Za-z](?![A-Za-z])|{_WORD})"
_SMALL = r"(?<![A-Za-z])[a-j](?=[ \t]*(?:[.,;:!)\]}]|$))"
_OPEN, _CLOSE = r"[(\[{<]*", r"[)\]}>]*"
_AND = r"[ \t,;/&|()\[\]{}]+(?:(?:and|or)\b[ \t(\[{]*)?"
_SENTENCE = rf"{_CLOSE}\.\s*{_OPEN}{_LETTER}(?=\s*(?:[.,;/&)\]}}]|\Z))"
_LIST = re.compile(rf"{_LETTER}(?:{_AND}{_LETTER}|{_SENTENCE})++")  # all of `A, B or C` and of `A. B. C.`; becomes `A,B,C`
_SEVERAL = rf"{_LETTER}(?:,{_LETTER})*"
_OPTION = r"(?i:(?:option|choice|letter)\s+)?"

_REJECTED = re.compile(
    rf"\b(?i:not|nor|neither|except)\s+{_OPTION}{_OPEN}{_SEVERAL}{_CLOSE}"
    rf"|{_SEVERAL}{_CLOSE}\s+(?i:is|are)(?:n['’]t\b|\s+(?i:not|wrong|incorrect|false)\b)"
)
_DECLARED = re.compile(
    r"(?:(?i:\b(?:answer|option|choice)\s*(?:is\b|(?:would|should|must)\s+be\b|[:=])|答案\s*[是为:])\s*:?\s*"
    rf"{_OPTION}|\\boxed\s*){_OPEN}(?P<after>{_SEVERAL}|{_SMALL}(?:{_AND}{_SMALL})*)"
    rf"|(?P<before>{_SEVERAL}){_CLOSE}\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b"
    rf"|^[ \t>#(\[{{-]*(?P<line>[A-Ja-j])[)\]}}.:,]*[ \t]*$",
    re.MULTILINE,
)
_NAMED = re.compile(rf"{_LETTER}|(?<![A-Za-z0-9])\([a-j]\)|^[ \t]*[a-j][.):](?=[ \t])", re.MULTILINE)
_BLANKS = re.compile(r"\n\s*|[^\S\n]+")  # of several, one is left: patterns go over it once
_DECORATION = re.compile(r"[*_`$\"“”]|\\(?:text|mathrm)(?:bf)?\b")


def chosen_letter(text: str, choices: int) -> str | None:
    """The letter that a text answers with, among the first `choices` from A on; None for none or several.

    What follows `</think>` is read, its last 20,000 characters. Declared answers count first:
    `Answer: B`, `the answer is (B)`, `B is correct`, 答案是B,
    `\\boxed{B}`, a letter alone on its line. Without one, all letters the text names have to be the same: `B. Paris`,
    `(B)`, `I choose B`. Rejected ones (`not C`, `C is wrong`) do not count. Small letters count in brackets, at the start of a
    line before a mark, alone on it, or at the end of a declared answer: `(b)`, `b) Paris`, `answer: b`, never `a dog`.

    >>> chosen_letter("A is wrong, so the answer is B.", 4), chosen_letter("A or B", 4)
    ('B', None)
    """
    plain = unicodedata.normalize("NFKC", text.rpartition("</think>")[2][-_READ_CHARACTERS:])
    plain = _BLANKS.sub(lambda match: match.group()[0], plain)
    plain = _LIST.sub(lambda match: ",".join(dict.fromkeys(_letters(match.group()))), _DECORATION.sub("", plain))
    plain = _REJECTED.sub(" ", plain)
    parts = [match.group(match.lastgroup or 0) for match in _DECLARED.finditer(plain)] or _NAMED.findall(plain)
    named = {letter.upper() for part in parts for letter in _letters(part)} & set(_LETTERS[:choices])
    return named.pop() if len(named) == 1 else None


def _letters(text: str) -> list[str]:
    return re.findall(r"\b[A-Ja-j]\b", text)


@dataclass(frozen=True)
class MultipleChoice:
    """1 where the completion settles on the right letter (`Answer: B`, `(B)`, `B. Paris`), else 0: also for no letter or
    several.

    The data's column holds a letter or an index from 0. A completion without an answer scores 0, not None: silence must not
    pay. Where an option's own text names a letter (`C. Vitamin A`), only a declared answer counts: ask for `Answer: C`. End a
    base model's text before it writes the next question (`generation.stop_strings`).

    >>> MultipleChoice(choices=4)(["…"] * 2, ["The answer is (B).", "A or B"], answer=["B", 1])
    [1.0, 0.0]
    """

    range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    choices: int
    answer_column: str = "answer"

    def __post_init__(self) -> None:
        if not 2 <= self.choices <= len(_LETTERS):
            raise ValueError(f"multiple_choice: expected 2 to {len(_LETTERS)} choices, got {self.choices}")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        answers = column(columns, self.answer_column, "multiple_choice", "answer_column")
        right = [self._right_letter(answer, row) for row, answer in enumerate(answers)]
        chosen = [chosen_letter(completion_text(completion), self.choices) for completion in completions]
        return [float(letter == answer) for letter, answer in zip(chosen, right, strict=True)]

    def _right_letter(self, answer: Any, row: int) -> str:
        valid = _LETTERS[: self.choices]
        if isinstance(answer, numbers.Integral) and not isinstance(answer, bool) and 0 <= int(answer) < self.choices:
            return valid[int(answer)]
        if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in valid:
            return answer.strip().upper()
        raise UserError(
            f"multiple_choice: completion {row} has {answer!r:.60} in column {self.answer_column!r}; expected a letter A to "
            f"{valid[-1]} or an index 0 to {self.choices - 1}"
        )
