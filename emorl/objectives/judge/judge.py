"""A language model as judge: behind an OpenAI-compatible endpoint, or a local transformers chat model.

The score is the judge's expected value over its probabilities of the valid answers where it gives them (as G-Eval, Liu et
al. 2023, arXiv 2303.16634), else its answer. A completion that the judge did not validly answer has no score: never a
made-up one.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from emorl.config import UserError, nearest
from emorl.objectives.judge.chat_endpoint import SET_BY_EMORL, ChatEndpoint, check_url
from emorl.objectives.judge.ledger import Ledger, Limits
from emorl.objectives.judge.local_chat import LocalChat
from emorl.objectives.judge.questions import Question, labels_of, pair_questions, score_question

logger = logging.getLogger(__name__)

_LARGEST_RANGE = 1000


@dataclass(config=ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False))
class Judge:
    """Scores in [0, 1]: the place on the scale (`mode: score`), or the probability that the completion is better than a
    reference, asked in both orders (`mode: pairwise`; a tie is 0.5).

    An asynchronous reward function: TRL awaits it beside others, `emorl.objectives.loading.Objective` runs it.

    Where the judge gives probabilities (`logprobs` of up to 20 tokens at an endpoint, all tokens locally), the score is the
    mean of the valid answers under them, renormalised; where these hold less than `minimum_share` of the probability, the
    answer is invalid. Where an endpoint refuses logprobs, the answer alone counts, read strictly, after `</think>`. A scale
    beyond the digits 0 to 9 is asked for as letters, each one token; one of more than 26 scores only as numbers in the text.

    Raises:
        UserError: on a call: the configuration is wrong (the endpoint refuses the key or the model, a column is missing), a
            spend limit is reached; with `failure: error`, a completion got no valid answer.

    >>> judge = Judge(model="Qwen/Qwen3-8B", endpoint="http://localhost:8000/v1", rubric="Is the reply kind?")
    >>> asyncio.run(judge(prompts=["I failed."], completions=["I am sorry to hear that."]))  # doctest: +SKIP
    [0.91]
    """

    range: ClassVar = (0.0, 1.0)

    model: str
    """name of the model at the endpoint; without an endpoint, folder or hub id of a chat model with safetensors weights"""
    rubric: str
    """what to judge by, in words"""
    endpoint: str | None = None
    """base URL of an OpenAI-compatible server, such as http://localhost:8000/v1"""
    mode: Literal["score", "pairwise"] = "score"
    """score each completion on the scale, or compare it with a reference"""
    scale: tuple[int, int] = (1, 5)
    """lowest and highest score the judge may give (mode: score)"""
    reference_column: str = "reference"
    """the data set's column with the reference completions (mode: pairwise)"""
    failure: Literal["error", "none"] = "error"
    """where the judge gives no valid answer: stop with an error, or leave that completion without a score"""
    minimum_share: float = Field(default=0.5, gt=0, le=1)
    """least probability that the valid answers must hold together"""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """arguments of the judge's chat template, such as {enable_thinking: false}"""
    batch_size: int = Field(default=16, ge=1)
    """questions per forward pass of a local model"""
    api_key_variable: str = Field(default="OPENAI_API_KEY", pattern="^[A-Za-z_][A-Za-z0-9_]*$")
    """environment variable that holds the endpoint's API key; no key is sent where it is not set"""
    max_answer_tokens: int = Field(default=16, ge=1)
    """tokens an endpoint may answer with; thousands for a model that thinks"""
    request: dict[str, Any] = Field(default_factory=dict)
    """further fields of the request body, such as {max_completion_tokens: 2000, temperature: null}; null leaves one out"""
    concurrency: int = Field(default=8, ge=1)
    """requests in flight"""
    timeout: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """seconds for one request"""
    retries: int = Field(default=5, ge=0)
    """tries after the first: on 429, 5xx, time-outs and lost connections"""
    backoff: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """seconds before the second try, doubled for each further one, less up to a half at random; at least Retry-After"""
    cache: Path | None = None
    """SQLite file of answers and of what has been spent; ~/.cache/emorl/judge.sqlite by default"""
    max_requests: int | None = Field(default=None, ge=1)
    """most requests ever sent to this model by users of the cache file; tries count"""
    max_tokens: int | None = Field(default=None, ge=1)
    """most tokens, read and written, by the server's `usage`"""
    max_cost: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """most to pay, in the currency of the prices"""
    price_per_million: dict[Literal["input", "output"], float] = Field(default_factory=dict)
    """prices per million tokens: {input: 0.15, output: 0.6}"""

    def __post_init__(self) -> None:
        if not self.rubric.strip():
            raise UserError("rubric is empty; say in words what to judge by")
        if not self.model.strip():
            raise UserError("model is empty; give its name at the endpoint, or the folder or hub id of a local one")
        if not 0 < self.scale[1] - self.scale[0] <= _LARGEST_RANGE:
            raise UserError(f"scale: expected [lowest, highest], at most {_LARGEST_RANGE} apart, got {list(self.scale)}")
        self._chat: ChatEndpoint | LocalChat = self._local() if self.endpoint is None else self._at(self.endpoint)

    async def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        asked = self._questions(prompts, completions, columns)  # one or two for each completion
        judge = self._chat.identity()
        keys = {question: question.key(judge) for questions in asked for question in questions}
        with Ledger(self._cache_path()) as ledger:
            known = ledger.known(list(keys.values()))
            values = {question: known[key] for question, key in keys.items() if key in known}

            def keep(question: Question, value: float) -> None:
                ledger.keep(keys[question], value)
                values[question] = value

            new = [question for question in keys if question not in values]
            failures = await self._chat.answer_all(new, ledger, keep, self.failure == "error")
        if failures:
            reason = f"judge {self._chat}: {next(iter(failures.values()))}"
            if self.failure == "error":
                raise UserError(f"{reason}. Answers are kept; `failure: none` would leave such a completion without a score")
            logger.warning("%d of %d questions have no answer; the first: %s", len(failures), len(keys), reason)
        return [_mean([values.get(question) for question in questions]) for questions in asked]

    def _questions(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]
    ) -> list[tuple[Question, ...]]:
        pairs = zip(prompts, completions, strict=True)
        if self.mode == "score":
            return [(score_question(self.rubric, self.scale, prompt, completion),) for prompt, completion in pairs]
        if self.reference_column not in columns:
            raise UserError(
                f"judge: mode pairwise needs the data's column {self.reference_column!r} (`reference_column`), which is not "
                f"there; {nearest(self.reference_column, columns)}"
            )
        references = columns[self.reference_column]
        for row, reference in enumerate(references):
            if not reference:
                raise UserError(f"judge: completion {row} has no reference in column {self.reference_column!r}")
        return [
            pair_questions(self.rubric, prompt, completion, reference)
            for (prompt, completion), reference in zip(pairs, references, strict=True)
        ]

    def _local(self) -> LocalChat:
        endpoint_only = ("request", "max_requests", "max_tokens", "max_cost", "price_per_million")
        wrong = [name for name in endpoint_only if getattr(self, name)]
        if wrong:
            raise UserError(f"{wrong[0]} is for a judge at an `endpoint`; a local model has none")
        if not self._labels_are_tokens():
            raise UserError(f"scale: a local judge takes at most 26 scores, got {list(self.scale)}")
        return LocalChat(self.model, self.chat_template_kwargs, self.minimum_share, self.batch_size)

    def _at(self, endpoint: str) -> ChatEndpoint:
        for name in SET_BY_EMORL:
            if name in self.request:
                raise UserError(f"request.{name} is set by emorl; leave it out")
        template = {"chat_template_kwargs": self.chat_template_kwargs} if self.chat_template_kwargs else {}
        length = {} if "max_completion_tokens" in self.request else {"max_tokens": self.max_answer_tokens}
        request = {**length, **template, **self.request}
        by_tokens = self.max_tokens is not None or self.max_cost is not None
        if by_tokens and not (request.get("max_completion_tokens") or request.get("max_tokens")):
            raise UserError("max_tokens and max_cost need a bound on each answer: request.max_completion_tokens or .max_tokens")
        if self.max_cost is not None and set(self.price_per_million) != {"input", "output"}:
            raise UserError("max_cost needs price_per_million: {input: …, output: …}")
        if any(not 0 <= price < math.inf for price in self.price_per_million.values()):
            raise UserError(f"price_per_million: expected prices of at least 0, got {self.price_per_million}")
        if (self.max_requests is not None or by_tokens) and self.cache is None:
            raise UserError("a spend limit counts what is spent in a cache file of its own; name one by `cache`")
        prices = (self.price_per_million.get("input", 0.0), self.price_per_million.get("output", 0.0))
        return ChatEndpoint(
            url=check_url(endpoint),
            model=self.model,
            request=request,
            key_variable=self.api_key_variable,
            limits=Limits(self.max_requests, self.max_tokens, self.max_cost, *prices),
            minimum_share=self.minimum_share,
            concurrency=self.concurrency,
            timeout=self.timeout,
            retries=self.retries,
            backoff=self.backoff,
        )

    def _labels_are_tokens(self) -> bool:
        return self.mode == "pairwise" or all(len(label) == 1 for label in labels_of(self.scale))

    def _cache_path(self) -> Path:
        if self.cache is not None:
            return self.cache.expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emorl" / "judge.sqlite"


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one of them is missing."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if len(present) == len(values) else None
