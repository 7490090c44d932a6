"""A request becomes what the engine writes: who answers, the prompt as tokens, and how they are chosen."""

import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from emorl.config import UserError
from emorl.serving.answers import Answer, ChatAnswer, CompletionAnswer, Echo
from emorl.serving.jobs import Asked
from emorl.serving.models import Model, Models
from emorl.serving.requests import ChatRequest, CompletionRequest, FieldError, Request
from emorl.serving.voices import AnyVoice

_TEMPLATE_NAME = re.compile(r"[A-Za-z_]\w{0,63}", re.ASCII)
_OF_TEMPLATES = (ArithmeticError, AttributeError, LookupError, RecursionError, ValueError)  # of values they do not expect


@dataclass(frozen=True)
class Defaults:
    """What a run says of answers, where a request does not.

    Args:
        generation: in transformers' words, with max_new_tokens.
        system_prompt: of conversations without a system turn.
        after: the mark behind which answers begin.
        longest_prompt: in tokens.
    """

    generation: Mapping[str, Any]
    system_prompt: str | None = None
    after: str | None = None
    longest_prompt: int | None = None


@dataclass(frozen=True, eq=False)
class Preparing:
    """Makes requests ready, in any thread, one at a time: a tokenizer cannot serve two."""

    models: Models
    tokenizer: PreTrainedTokenizerBase
    defaults: Defaults
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _widest: int = 0
    """characters of the longest token"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokenizer", deepcopy(self.tokenizer))  # the engine's own writes texts meanwhile
        object.__setattr__(self, "_widest", max(map(len, self.tokenizer.get_vocab())))

    def prepare(self, request: Request) -> tuple[Answer, list[Asked]]:
        """An empty answer, and what is to be written for it: one for each prompt.

        Raises:
            UserError: what the request asks for is not there, or does not fit; a `FieldError` where one field is to blame.
        """
        model = self.models.find(request.model, request.weights, request.prefer)
        with self._lock:
            if isinstance(request, ChatRequest):
                return ChatAnswer(request.model, model, asked := [self._chat(request, model)]), asked
            return self._completion(request, model)

    def _chat(self, request: ChatRequest, model: Model) -> Asked:
        turns: Any = [turn.plain for turn in request.messages]
        if self.defaults.system_prompt and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.defaults.system_prompt}, *turns]
        if turns[-1]["role"] != "user":
            raise FieldError("messages", "messages: the last turn must be the user's")
        prompt = model.voice.prompt(turns if model.voice.reads_turns(self.tokenizer) else _only_turn(turns))
        ids = self._ids(prompt, request.chat_template_kwargs, model.voice)
        return self._asked(request, model, prompt, ids, after=self.defaults.after, strip=True)

    def _completion(self, request: CompletionRequest, model: Model) -> tuple[Answer, list[Asked]]:
        asked, echoes = [], []
        for given in request.prompts:
            prompt, ids = self._text_prompt(given, model)
            asked.append(self._asked(request, model, prompt, ids, scores_prompt=bool(request.echo)))
            text = given if isinstance(given, str) else str(self.tokenizer.decode(ids))
            echoes.append(Echo(text, str(self.tokenizer.decode(ids[:1]))))
        return CompletionAnswer(request.model, model, asked, echoes if request.echo else ()), asked

    def _text_prompt(self, given: str | list[int], model: Model) -> tuple[str, list[int]]:
        if isinstance(given, str):
            prompt = model.voice.prompt(given)
            return prompt, self._ids(prompt, {}, model.voice)
        if not model.voice.reads_tokens:
            raise FieldError("prompt", f"prompt: {model.name!r:.80} reads text, not tokens; send a string")
        return "", given

    def _ids(self, prompt: Any, arguments: Mapping[str, Any], voice: AnyVoice) -> list[int]:
        longest = self.defaults.longest_prompt or voice.longest
        size = len(prompt) if isinstance(prompt, str) else sum(len(turn["content"]) for turn in prompt)
        if longest is not None and size > longest * self._widest:  # reading it all would keep the others waiting
            raise FieldError(
                "messages",
                f"a prompt of {size:,} characters cannot be the {longest:,} tokens that this server takes; shorten it",
            )
        for name in arguments:
            if not _TEMPLATE_NAME.fullmatch(name):
                raise FieldError("chat_template_kwargs", f"chat_template_kwargs: {name!r:.80} is no name of an argument")
        try:
            ids = voice.ids(self.tokenizer, prompt, arguments)
        except UserError as error:
            raise FieldError("messages", str(error)) from None
        except _OF_TEMPLATES as error:
            raise FieldError("chat_template_kwargs", f"the chat template cannot take these arguments: {error!r:.160}") from None
        if not ids:
            raise FieldError("prompt", "prompt: it has no tokens; send at least one character")
        return ids

    def _asked(self, request: Request, model: Model, prompt: Any, ids: Sequence[int], **how: Any) -> Asked:
        voice, logprobs = model.voice, request.alternatives
        if max(ids) >= voice.vocabulary:
            raise FieldError("prompt", f"prompt: token {max(ids)} is beyond the vocabulary of {voice.vocabulary}")
        if logprobs is not None and not voice.joins:
            raise FieldError("logprobs", f"logprobs: {model.name!r:.80} cannot tell them; leave it out")
        generation = {**self.defaults.generation, **request.generation}
        if generation.get("temperature", 1.0) is None:
            generation.pop("temperature")
        most = self._most_tokens(request.most_tokens, len(ids), voice)
        asked = Asked(
            voice,
            prompt,
            tuple(ids),
            most,
            voice.sampling(generation, len(ids), most),
            seed=secrets.randbits(32) if request.seed is None else request.seed,
            samples=request.samples,
            stop=request.stops,
            logprobs=logprobs,
            **{**how, "scores_prompt": how.get("scores_prompt", False) and logprobs is not None},
        )
        assert asked.joins is not None  # worked out here, not where others wait
        return asked

    def _most_tokens(self, wanted: int | None, tokens: int, voice: AnyVoice) -> int:
        """How many may be written; by default as the run says, as far as they fit."""
        default, longest = int(self.defaults.generation.get("max_new_tokens") or 64), self.defaults.longest_prompt
        if longest is not None and tokens > longest:
            raise FieldError("messages", f"a prompt of {tokens:,} tokens is longer than this server takes: {longest:,}")
        room = voice.longest
        if room is None:
            return default if wanted is None else wanted
        needed = max(tokens, wanted or 1) if voice.is_encoder_decoder else tokens + (1 if wanted is None else wanted)
        if needed > room and wanted is None:
            raise FieldError(
                "messages", f"a prompt of {tokens:,} tokens leaves no room: the model has {room:,} positions; shorten it"
            )
        if needed > room:
            raise FieldError(
                "max_tokens",
                f"a prompt of {tokens:,} tokens and max_tokens={wanted:,} need {needed:,} positions, and the model has "
                f"{room:,}; shorten the prompt or ask for fewer tokens",
            )
        return wanted if wanted is not None else min(default, room if voice.is_encoder_decoder else room - tokens)


def _only_turn(turns: Sequence[Mapping[str, str]]) -> str:
    """What a base without a chat template reads: the one thing that the user said."""
    if len(turns) != 1:
        raise FieldError(
            "messages", "messages: this base has no chat template; send one user turn, or a text to /v1/completions"
        )
    return turns[0]["content"]
