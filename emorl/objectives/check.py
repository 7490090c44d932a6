"""Runs objectives on texts that policies may produce and that break reward functions (`emorl objectives check`).

Every case is scored alone, in one batch with all others, and alone again. It passes when its score is a finite number inside
the declared range, or None, and the same each time.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emorl.config import UserError
from emorl.objectives.loading import Objective
from emorl.objectives.scale import interval
from emorl.policies.conversation import as_completion, completion_text, prompt_text

NORMAL = "normal"
TOGETHER = "all in one batch"
_ANSWER = "It sounds like this has been hard for you, and you want it to change."
_LONG = " ".join((_ANSWER.split() * 400)[:5000])
_COMPLETIONS = {
    NORMAL: _ANSWER,
    "empty": "",
    "only spaces and newlines": " \n\t \n  ",
    "one word": "Yes.",
    "one word, 200 times": "good " * 200,
    "5,000 words": _LONG,
    "emoji": "😀👩‍👩‍👧‍👦🎉 I hear you 💙",
    "Arabic": "يبدو أن هذا كان صعبا عليك.",
    "Chinese": "听起来这对你来说很难。",
    "Hindi": "लगता है यह आपके लिए कठिन रहा है।",
    "Greek": "Φαίνεται ότι αυτό ήταν δύσκολο για σένα.",
    "only punctuation": "?!... --- ,,, ;;; ()[]{} \"'",
    "control characters": "It\x00 is\x07 hard\x1b[31m.\r\n",
    "zero-width characters": "\u200b\u200c\u200d\ufeff\u2060",
    "HTML": "<div class='a'><b>It is hard.</b><br/>&nbsp;</div>",
    "JSON": '{"score": 1.0, "text": ["It is hard.", null]}',
    "special tokens written out": "<|end|></s><|endoftext|>[SEP][PAD]<s>",
}


@dataclass(frozen=True)
class CaseResult:
    """One objective on one case: what the function gave, the score on the objective's scale, and what is wrong with it."""

    case: str
    raw: float | None
    score: float | None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckResult:
    """One objective on all cases. `other_format` is the normal case as plain text where the experiment's prompts are
    conversations, and the other way round; its problem fails nothing, because the experiment never asks for it."""

    objective: str
    scale: str
    cases: tuple[CaseResult, ...]
    other_format: CaseResult
    seconds: float

    @property
    def passed(self) -> bool:
        return not any(case.problems for case in self.cases)


@dataclass(frozen=True)
class _Case:
    name: str
    prompt: Any
    completion: Any


_Outcome = list[float | None] | str
"""raw scores of cases in one call, or its error in one line"""


def check_edge_cases(objective: Objective, row: Mapping[str, Any]) -> CheckResult:
    """Scores all cases.

    Args:
        row: a row of the experiment's prompts in the format its base takes: `prompt` and the data set's other columns.
    """
    start = time.perf_counter()
    columns = {name: value for name, value in row.items() if name != "prompt"}
    cases = _cases(row["prompt"])
    alone = [_raw(objective, [case], columns) for case in cases]
    whole = [case for case, outcome in zip(cases, alone, strict=True) if not isinstance(outcome, str)]
    batch = _raw(objective, whole, columns) if whole else []
    batched = {} if isinstance(batch, str) else {case.name: score for case, score in zip(whole, batch, strict=True)}
    results = []
    for case, outcome in zip(cases, alone, strict=True):
        again = outcome if isinstance(outcome, str) else _raw(objective, [case], columns)
        results.append(_judged(objective, case.name, outcome, again, batched))
    if isinstance(batch, str):
        results.append(CaseResult(TOGETHER, None, None, (batch,)))
    other = _other_format(cases[0])
    outcome = _raw(objective, [other], columns)
    normal = {} if isinstance(alone[0], str) else {other.name: alone[0][0]}
    other_format = _judged(objective, other.name, outcome, outcome, normal)
    return CheckResult(objective.name, str(objective.scale), tuple(results), other_format, time.perf_counter() - start)


def _cases(prompt: Any) -> list[_Case]:
    """All cases in the prompt's format, the normal one first."""
    user = prompt_text(prompt)
    cases = [_Case(name, prompt, as_completion(prompt, text)) for name, text in _COMPLETIONS.items()]
    cases.append(_Case("the prompt itself", prompt, as_completion(prompt, user)))
    if isinstance(prompt, str):
        return [*cases, _Case("a prompt of 5,000 words", _LONG, _ANSWER)]
    answer, question = {"role": "assistant", "content": "Go on."}, {"role": "user", "content": user}
    long = [*(turn for turn in prompt if turn["role"] == "system"), {"role": "user", "content": _LONG}]
    return [
        *cases,
        _Case("a prompt of 5,000 words", long, as_completion(prompt, _ANSWER)),
        _Case("a prompt of three turns", [*prompt, answer, question], as_completion(prompt, _ANSWER)),
    ]


def _other_format(case: _Case) -> _Case:
    """A case as plain text where it is a conversation, and the other way round."""
    if isinstance(case.prompt, str):
        turns = [{"role": "user", "content": case.prompt}]
        return _Case("as a conversation", turns, as_completion(turns, case.completion))
    return _Case("as plain text", prompt_text(case.prompt), completion_text(case.completion))


def _raw(objective: Objective, cases: Sequence[_Case], columns: Mapping[str, Any]) -> _Outcome:
    values = {name: [value] * len(cases) for name, value in columns.items()}
    try:
        return objective.raw([case.prompt for case in cases], [case.completion for case in cases], **values)
    except UserError as error:
        return str(error)
    except Exception as error:  # whatever a reward function raises is what is looked for here
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _judged(objective: Objective, name: str, outcome: _Outcome, again: _Outcome, others: Mapping[str, Any]) -> CaseResult:
    """A case with its problems; `others` holds the scores from the batch."""
    if isinstance(outcome, str):
        return CaseResult(name, None, None, (outcome,))
    (raw,) = outcome
    problems = []
    if raw is not None and objective.scale.is_outside(raw):
        problems.append(f"raw score {raw:g} is outside the range {interval(objective.scale.range)}")
    if again != outcome:
        problems.append(f"another score when asked again: {raw} and then {again if isinstance(again, str) else again[0]}")
    elif not _same(raw, others.get(name, raw), objective.batch_tolerance):
        problems.append(f"another score in a batch: {raw} alone, {others[name]} with others")
    return CaseResult(name, raw, None if raw is None else objective.scale.score(raw), tuple(problems))


def _same(first: float | None, second: float | None, tolerance: float) -> bool:
    if first is None or second is None:
        return first is second
    return math.isclose(first, second, rel_tol=0, abs_tol=tolerance)
