"""Reads a judge's value from a chat completion: from the probabilities of the answer's token, or else from its text."""

import math
import re
from typing import Any

from emorl.objectives.judge.questions import Question, UnansweredError

_THOUGHTS_END = "</think>"
_END_TOKENS = 4  # more than a template puts behind an answer


def read_completion(completion: dict[str, Any], question: Question, minimum_share: float) -> float:
    """The value that a chat completion gives: the expected one over the answer's token where its probabilities came too.

    Raises:
        UnansweredError: it holds no valid answer.
    """
    choice = completion["choices"][0]
    content, cut = choice["message"].get("content"), choice.get("finish_reason") == "length"
    if not isinstance(content, str) or not content.strip():
        raise UnansweredError("the judge said nothing" + (" but thoughts; raise max_answer_tokens" if cut else ""))
    answer = _without_thoughts(content).strip()
    match = question.find(answer)
    probabilities = _answer_token(choice, answer, match.start("label") if match else 0)
    thought = answer != content.strip()
    if cut and (thought or probabilities is None):
        raise UnansweredError(f"the judge's answer {answer!r:.60} was cut off; raise max_answer_tokens")
    if probabilities is not None and (match is None or probabilities[0] == match["label"]):
        token, distribution = probabilities
        rest = answer.removeprefix(token)  # `4 because …` is an answer, `45`, `4.5` and `4 of 10` are none
        if match or token not in question.labels or not (re.match(r"\w|/", rest) or re.search(r"\d", rest)):
            return question.expected_value(distribution, minimum_share)
    elif match:
        return question.value(match["label"])
    raise UnansweredError(f"the judge answered {answer!r:.60}; expected {_valid(question)} and nothing else")


def _answer_token(choice: dict[str, Any], answer: str, offset: int) -> tuple[str, dict[str, float]] | None:
    """The token at `offset` of the answer and the probabilities of those that could have stood there; None where the server
    gave no probabilities, or its tokens do not spell the answer."""
    entries = list((choice.get("logprobs") or {}).get("content") or [])
    spelled = "".join(entry["token"] for entry in entries)
    for _ in range(_END_TOKENS):
        if entries and not spelled.rstrip().endswith(answer):
            spelled = spelled.removesuffix(entries.pop()["token"])
    if not answer or not entries or not spelled.rstrip().endswith(answer):
        return None
    position = spelled.rindex(answer) + offset
    for entry in entries:
        position -= len(entry["token"])
        if position < 0:
            break
    if not entry.get("top_logprobs"):
        return None
    probabilities = {other["token"]: math.exp(min(other["logprob"], 1.0)) for other in [*entry["top_logprobs"], entry]}
    return entry["token"].strip(), probabilities


def _valid(question: Question) -> str:
    labels = question.labels
    return f"one of {', '.join(labels)}" if len(labels) <= 5 else f"one of {labels[0]} to {labels[-1]}"


def _without_thoughts(answer: str) -> str:
    """What follows `<think>…</think>`.

    Raises:
        UnansweredError: the thoughts have no end.
    """
    if _THOUGHTS_END in answer:
        return answer.rpartition(_THOUGHTS_END)[2]
    if answer.lstrip().startswith("<think>"):
        raise UnansweredError("the judge never stopped thinking; raise max_answer_tokens or switch thinking off")
    return answer
