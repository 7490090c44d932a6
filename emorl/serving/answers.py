"""Answers in OpenAI's form, of chats and of plain completions, whole and as the chunks of a stream."""

import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from emorl.serving.jobs import Asked, PromptScores, Written
from emorl.serving.models import Model
from emorl.serving.token_scores import TokenScore
from emorl.serving.writing import BROKEN

_LONGEST = 600  # characters of a refusal


@dataclass
class Choice:
    """One text of an answer, gathered from its pieces."""

    text: str = ""
    reasoning: str = ""
    scores: list[TokenScore] = field(default_factory=list)
    tokens: int = 0
    end: str | None = None
    shown: int = 0
    """characters of the tokens whose scores a stream has told"""

    @property
    def has_begun(self) -> bool:
        return self.tokens > 0 or self.end is not None

    def add(self, written: Written) -> None:
        self.text += written.piece.text
        self.reasoning += written.piece.reasoning
        self.scores += written.scores
        self.tokens, self.end = written.tokens, written.end


@dataclass(frozen=True)
class Echo:
    """A prompt that is repeated before its texts, and its first token as text."""

    text: str
    first: str


class Answer:
    """What all answers share; a subclass says how one choice looks.

    Args:
        asked: one for each prompt; choice `i * n + j` is text j of prompt i.
        echoes: each prompt, where it is repeated before its texts.
    """

    kind = chunk_kind = prefix = ""

    def __init__(self, name: str, model: Model, asked: Sequence[Asked], echoes: Sequence[Echo] = ()) -> None:
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        self._described, self._asked, self._echoes = model.described, asked, echoes
        self._prompt_scores: dict[int, Sequence[TokenScore]] = {}
        self._choices = [Choice() for each in asked for _ in range(each.samples)]

    def add(self, prompt: int, event: Written | PromptScores) -> None:
        """Adds what was written."""
        if isinstance(event, PromptScores):
            self._prompt_scores[prompt] = event.scores
        else:
            self._choices[self._index(prompt, event)].add(event)

    def chunk(self, prompt: int, event: Written | PromptScores) -> dict[str, Any] | None:
        """Adds what was written; the chunk of a stream that says so."""
        part = None if isinstance(event, PromptScores) else self._part(self._index(prompt, event), event)
        self.add(prompt, event)
        return part and self._chunk([part])

    def whole(self) -> dict[str, Any]:
        """The answer, when all of it is there."""
        choices = [self._choice(index, choice) for index, choice in enumerate(self._choices)]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self.usage, "emorl": self._described}

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._chunk([]), "usage": self.usage}

    @property
    def usage(self) -> dict[str, int]:
        read, written = sum(len(each.ids) for each in self._asked), sum(choice.tokens for choice in self._choices)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _index(self, prompt: int, written: Written) -> int:
        return prompt * self._asked[prompt].samples + written.sample

    def _chunk(self, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": list(choices), "emorl": self._described}

    def _part(self, index: int, written: Written) -> dict[str, Any]:
        """What a chunk says of a choice, before it is added."""
        raise NotImplementedError

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError


class ChatAnswer(Answer):
    """Of `POST /v1/chat/completions`. What comes before the mark behind which answers begin is `reasoning_content`."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def _part(self, index: int, written: Written) -> dict[str, Any]:
        delta: dict[str, Any] = {} if self._choices[index].has_begun else {"role": "assistant", "content": ""}
        if written.piece.reasoning:
            delta["reasoning_content"] = written.piece.reasoning
        if written.piece.text:
            delta["content"] = written.piece.text
        logprobs = _chat_scores(written.scores) if written.scores else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": written.end}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        logprobs = _chat_scores(choice.scores) if choice.scores else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.end}


class CompletionAnswer(Answer):
    """Of `POST /v1/completions`."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def _part(self, index: int, written: Written) -> dict[str, Any]:
        choice = self._choices[index]
        text, scores = ("", []) if choice.has_begun else self._opening(index)
        scores = [*scores, *written.scores]
        logprobs = self._scored(scores, choice.shown)
        choice.shown += sum(len(score.text) for score in scores)
        return {"index": index, "text": text + written.piece.text, "logprobs": logprobs, "finish_reason": written.end}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text, scores = self._opening(index)
        logprobs = self._scored([*scores, *choice.scores])
        return {"index": index, "text": text + choice.text, "logprobs": logprobs, "finish_reason": choice.end}

    def _opening(self, index: int) -> tuple[str, list[TokenScore]]:
        """The prompt where it is repeated, and the scores of its tokens; the first one has nothing before it, and so no
        log-probability."""
        prompt = index // self._asked[0].samples
        if not self._echoes:
            return "", []
        echo = self._echoes[prompt]
        scores = self._prompt_scores.get(prompt)
        return echo.text, [] if scores is None else [TokenScore(echo.first, math.nan), *scores]

    def _scored(self, scores: Sequence[TokenScore], start: int = 0) -> dict[str, Any] | None:
        """Args: start: where the first one stands in the text."""
        if self._asked[0].logprobs is None:
            return None
        is_known = [not math.isnan(score.logprob) for score in scores]
        return {
            "tokens": [score.text for score in scores],
            "token_logprobs": [score.logprob if known else None for score, known in zip(scores, is_known, strict=True)],
            "top_logprobs": [
                {score.text: score.logprob, **dict(reversed(score.top))} if known else None
                for score, known in zip(scores, is_known, strict=True)
            ],
            "text_offset": list(accumulate((len(score.text) for score in scores[:-1]), initial=start))[: len(scores)],
        }


def _chat_scores(scores: Sequence[TokenScore]) -> dict[str, Any]:
    """A token that is a part of a character has no text of its own, and so no bytes here."""

    def told(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": None if BROKEN in text else list(text.encode())}

    of_tokens = []
    for score in scores:
        top = [told(text, logprob) for text, logprob in score.top]
        of_tokens.append({**told(score.text, score.logprob), "top_logprobs": top})
    return {"content": of_tokens}


def error(message: str, status: int, field: str | None = None, code: str | None = None) -> dict[str, Any]:
    """A refusal in OpenAI's form."""
    kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
    return {
        "error": {
            "message": message[:_LONGEST],
            "type": kinds.get(status, "invalid_request_error"),
            "param": field,
            "code": code,
        }
    }
