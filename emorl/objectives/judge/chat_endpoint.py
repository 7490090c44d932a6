"""Asks a chat model behind any OpenAI-compatible endpoint (vLLM, llama.cpp, hosted): many questions at once, tried again.

Which failure is whose: 401, 402, 403, 404 and whatever else no other text could mend are mistakes of the configuration and
stop everything at once. 408, 409, 425, 429, 5xx, time-outs, lost connections and bodies that are no chat completion are tried
again, after a growing wait or the one the server asks for. 400, 413 and 422 are the text's failure where the server says so
(too long, filtered) or has answered before, and the configuration's otherwise. An answer that is none is not asked again.
"""

import asyncio
import json
import os
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from emorl.config import UserError
from emorl.objectives.judge.answers import read_completion
from emorl.objectives.judge.ledger import Account, Ledger, Limits, Spend
from emorl.objectives.judge.questions import Question, UnansweredError

_LONGEST_BACKOFF = 60.0  # seconds
_LONGEST_RETRY_AFTER = 600.0  # a server that asks for more is not waited for
_TURN_TOKENS = 256  # more than a chat template adds around one turn, for the upper bound on input tokens
_TRY_AGAIN = {408, 409, 425, 429}
_ABOUT_THE_TEXT = {400, 413, 422}
_TEXT_FAULTS = ("context", "too long", "too large", "content_filter", "content management policy", "moderation")
_TOP_LOGPROBS = 20  # the most that OpenAI and, by default, vLLM give
_MOST_TOKENS = 1 << 40  # of one request; a usage beyond is none
SET_BY_EMORL = ("model", "messages", "n", "stream")


class _TransientError(Exception):
    """A try that failed in a way that may pass; `after` is the wait the server asks for, in seconds."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


@dataclass
class ChatEndpoint:
    """A chat model at a URL; holds settings only, so that it can be pickled and used in any event loop.

    Args:
        url: base URL, as `http://localhost:8000/v1`.
        request: further fields of the request body; None leaves out one that emorl would send.
        key_variable: environment variable with the API key; nothing is sent where it is empty.
        concurrency: requests in flight.
        timeout: seconds for one request.
        retries: tries after the first.
        backoff: seconds before the second try, doubled for each further one and shortened at random by up to a half.
    """

    url: str
    model: str
    request: dict[str, Any]
    key_variable: str
    limits: Limits
    minimum_share: float
    concurrency: int
    timeout: float
    retries: int
    backoff: float
    _asks_logprobs: bool = field(default=True, init=False)
    _has_answered: bool = field(default=False, init=False)

    def __str__(self) -> str:
        return f"model {self.model!r} at {self.url}"

    def identity(self) -> list[Any]:
        """What an answer depends on besides the question; not the room it had, since one that was cut off is none."""
        request = {name: value for name, value in self.request.items() if name not in ("max_tokens", "max_completion_tokens")}
        return ["endpoint", self.url, self.model, request, self.minimum_share]

    async def answer_all(
        self, questions: Sequence[Question], ledger: Ledger, keep: Callable[[Question, float], None], stop_at_failure: bool
    ) -> dict[Question, UnansweredError]:
        """Hands each question's value to `keep` as it arrives; returns those without a valid answer.

        Requests in flight are waited for also where something goes wrong: they may have been paid for.

        Raises:
            UserError: a mistake in the configuration, or a spend limit is reached.
        """
        waiting, stop = deque(questions), asyncio.Event()
        failures: dict[Question, UnansweredError] = {}
        errors: list[UserError] = []
        account = Account(ledger, str(self), self.limits)
        key = self._key()

        async def work() -> None:
            while waiting and not stop.is_set():
                question = waiting.popleft()
                try:
                    keep(question, await self._answer(client, key, question, account, stop))
                except UnansweredError as failure:
                    failures[question] = failure
                    if stop_at_failure:
                        stop.set()
                except UserError as error:
                    errors.append(error)
                    stop.set()

        unlimited = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(timeout=None, limits=unlimited) as client, asyncio.TaskGroup() as group:
            for _ in range(min(self.concurrency, len(questions))):
                group.create_task(work())
        if errors:
            raise errors[0]
        return failures

    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip()
        if not key.isascii() or not key.isprintable() or " " in key:  # the HTTP library would repeat it in its message
            raise UserError(
                f"judge: the environment variable {self.key_variable} holds no API key: it has blanks or odd characters"
            )
        return key

    async def _answer(
        self, client: httpx2.AsyncClient, key: str, question: Question, account: Account, stop: asyncio.Event
    ) -> float:
        """One question's value, after as many tries as it takes."""
        jitter, after = random.Random(), 0.0  # not the global generator: a training run's seed must not notice
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                wait = min(_LONGEST_BACKOFF, self.backoff * 2 ** min(attempt - 1, 20)) * jitter.uniform(0.5, 1.0)
                if await _stopped(stop, max(wait, after)):
                    raise UnansweredError("not asked again, as something else went wrong")
            try:
                completion = await self._try(client, key, question, account)
                self._has_answered = True
                return read_completion(completion, question, self.minimum_share)
            except _TransientError as again:
                reason, after = str(again), again.after
            if after > _LONGEST_RETRY_AFTER:
                raise UnansweredError(f"{reason}; it asks to come back in {after:.0f} seconds")
        tries = "1 try" if self.retries == 0 else f"{self.retries + 1} tries"
        raise UnansweredError(f"no answer after {tries}, the last time: {reason}")

    async def _try(self, client: httpx2.AsyncClient, key: str, question: Question, account: Account) -> dict[str, Any]:
        """One request; the chat completion.

        Raises:
            _TransientError: it may be worth another try.
            UnansweredError: the server refuses this text.
            UserError: the server refuses the configuration, or a spend limit is reached.
        """
        asks_logprobs = self._asks_logprobs and question.by_token
        body = self._body(question, asks_logprobs)
        largest = actual = self._largest(body)
        await account.book(largest)
        try:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            content = json.dumps(body).encode()
            async with asyncio.timeout(self.timeout):
                response = await client.post(
                    f"{self.url}/chat/completions", content=content, headers={**headers, "Content-Type": "application/json"}
                )
            reply = _parsed(response)
            actual = _spend(response.status_code, reply, largest)
        except TimeoutError:
            # it may be charged for, so it stays booked
            raise _TransientError(f"nothing within {self.timeout:g} s (`timeout`)") from None
        except httpx2.ConnectError as error:
            actual = Spend()  # nothing was sent
            raise _TransientError(f"cannot connect ({_line(str(error), key)}); is the server running?") from None
        except httpx2.RequestError as error:
            raise _TransientError(f"the connection broke ({type(error).__name__}: {_line(str(error), key)})") from None
        finally:
            await account.settle(largest, actual)
        if response.status_code != 200 and asks_logprobs and _mentions_logprobs(response):
            self._asks_logprobs = False
            return await self._try(client, key, question, account)
        self._check_status(response, key)
        if not _is_completion(reply):
            words = _line(response.text, key)
            raise _TransientError(f"the answer is no chat completion ({words}); is the endpoint's URL right?")
        return reply

    def _body(self, question: Question, asks_logprobs: bool) -> dict[str, Any]:
        logprobs = {"logprobs": True, "top_logprobs": _TOP_LOGPROBS} if asks_logprobs else {}
        request = self.request
        if not asks_logprobs:
            request = {name: value for name, value in request.items() if name not in ("logprobs", "top_logprobs")}
        body = {"model": self.model, "messages": question.messages, "temperature": 0, **logprobs, **request}
        return {name: value for name, value in body.items() if value is not None}

    def _largest(self, body: dict[str, Any]) -> Spend:
        """An upper bound on what a request spends: no token is shorter than a byte."""
        content = sum(len(turn["content"].encode("utf-8", "replace")) for turn in body["messages"])
        output = body.get("max_completion_tokens") or body.get("max_tokens") or 0
        return Spend(1, content + _TURN_TOKENS * len(body["messages"]), output)

    def _check_status(self, response: httpx2.Response, key: str) -> None:
        status, words = response.status_code, _line(response.text, key)
        if status == 200:
            return
        reason = f"the server answered {status} ({words})"
        exhausted = status == 429 and "insufficient_quota" in response.text
        if (status in _TRY_AGAIN or status >= 500) and not exhausted:
            raise _TransientError(reason, _retry_after(response))
        about_text = any(fault in response.text.lower() for fault in _TEXT_FAULTS) or self._has_answered
        if status in _ABOUT_THE_TEXT and about_text:
            raise UnansweredError(reason)
        remedies = {
            401: f"is the API key in the environment variable {self.key_variable} right?",
            402: "is there money on the account?",
            403: f"may the API key in the environment variable {self.key_variable} use this model?",
            404: "is the model's name right, and does the endpoint end as the server wants it, mostly in /v1?",
            429: "the account's quota is used up",
        }
        remedy = remedies.get(status, "are `endpoint`, `model` and `request` right?")
        raise UserError(f"judge {self}: {reason}; {remedy}")


def check_url(url: str) -> str:
    """The base URL without a final slash.

    Raises:
        UserError: it is none.
    """
    try:
        parts = httpx2.URL(url)
        valid = parts.scheme in ("http", "https") and bool(parts.host) and not parts.query and not parts.fragment
    except httpx2.InvalidURL:
        valid, parts = False, httpx2.URL("")
    if parts.userinfo:
        raise UserError("endpoint: no user or password in the URL; give the key by the variable that `api_key_variable` names")
    if not valid or any(character.isspace() for character in url):
        raise UserError(f"endpoint: expected a URL such as http://localhost:8000/v1, got {url!r:.80}")
    if parts.path.rstrip("/").endswith("/completions"):
        raise UserError(f"endpoint: expected the base URL, which ends before /chat/completions, got {url!r:.120}")
    return url.rstrip("/")


def _parsed(response: httpx2.Response) -> Any:
    """The body as JSON; None where it is none, or nested deeper than can be read."""
    try:
        return response.json()
    except (ValueError, RecursionError):
        return None


def _is_completion(reply: Any) -> bool:
    """Whether the shape is that of a chat completion."""
    try:
        choice = reply["choices"][0]
        entries = (choice.get("logprobs") or {}).get("content") or []
        tokens = [token for entry in entries for token in [entry, *(entry.get("top_logprobs") or [])]]
        return isinstance(choice["message"], dict) and all(
            isinstance(token["token"], str) and token["logprob"] == float(token["logprob"]) for token in tokens
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError):
        return False


def _spend(status: int, reply: Any, largest: Spend) -> Spend:
    """What the server says it charged; all that was booked where it answered and says nothing that can be."""
    if status != 200:
        return Spend(requests=1)
    try:
        tokens = [int(reply["usage"][name]) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, TypeError, KeyError, OverflowError):
        return largest
    return Spend(1, *tokens) if all(0 <= number <= _MOST_TOKENS for number in tokens) else largest


def _mentions_logprobs(response: httpx2.Response) -> bool:
    return response.status_code in (400, 403, 404, 422, 501) and "logprob" in response.text.lower()


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the server asks to wait: a number or a date."""
    value = response.headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


async def _stopped(stop: asyncio.Event, seconds: float) -> bool:
    """Waits; True at once where everything is to stop."""
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return False
    return True


def _line(text: str, key: str) -> str:
    """A server's words as a short line that a terminal can show, without the key if it repeats it."""
    line = " ".join((text.replace(key, "***") if key else text).split())[:200]
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
