"""Requests that are answered one after the other: an encoder-decoder through `generate()`, a dynamic ensemble by itself."""

import logging
import queue
import threading
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from emorl.dynamic.agents.observation import Situation
from emorl.dynamic.ensemble import DynamicEnsemble
from emorl.serving.jobs import Failed, Job, Text, Written
from emorl.serving.voices import DynamicVoice, Voice
from emorl.serving.writing import Piece

logger = logging.getLogger(__name__)


class Alone:
    """A thread that answers one request after the other, beside the engine's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.running = 0
        self._thread = threading.Thread(target=self._run, name="emorl-alone", daemon=True)

    @property
    def waiting(self) -> int:
        return self._jobs.qsize()

    def start(self) -> None:
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Waits for what was submitted."""
        self._jobs.put(None)
        self._thread.join(seconds)

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self.running = 1
            try:
                for sample in range(job.asked.samples):
                    self._write(job, sample)
            except Exception as error:  # of torch, transformers or a tokenizer: the others must go on
                logger.exception("a request could not be answered")
                job.fail(error)
            self.running = 0

    def _write(self, job: Job, sample: int) -> None:
        voice, text = job.asked.voice, Text(job, sample, self._tokenizer)
        if job.is_over or job.asked.most_tokens == 0:
            text.end("length")
        elif isinstance(voice, DynamicVoice):
            _write_dynamic(job, voice, sample)
        else:
            _write_generated(job, voice, text)


class _GaveUpError(Exception):
    """Nobody waits any more."""


class _Watched:
    """An agent that gives up between two spans, when nobody waits for the answer any more."""

    def __init__(self, ensemble: DynamicEnsemble, job: Job) -> None:
        self._chooser, self._job = ensemble.chooser, job

    def __call__(self, situation: Situation) -> Tensor:
        if self._job.is_over:
            raise _GaveUpError
        return self._chooser(situation)


def _write_dynamic(job: Job, voice: DynamicVoice, sample: int) -> None:
    """The whole answer as one piece: its engine knows only whole characters of several models."""
    asked, own = job.asked, voice.ensemble
    ensemble = DynamicEnsemble(own.engine, _Watched(own, job), own.decoding, span=own.span, turns=own.turns, models=own.models)
    sampling = {"temperature": asked.sampling.temperature, "top_p": asked.sampling.top_p}
    seed = asked.seed + sample - own.decoding.seed  # an ensemble adds its own
    try:
        answer = ensemble.generate([asked.prompt], seeds=[seed], max_new_tokens=asked.most_tokens, **sampling)[-1]
    except _GaveUpError:
        job.deliver(Failed("the answer took longer than this server gives to a request (serve.seconds); ask for fewer tokens"))
        job.is_gone = True
        return
    places = [place for stop in asked.stop if (place := answer.text.find(stop)) >= 0]
    text = answer.text[: min(places)] if places else answer.text
    end = "length" if answer.tokens >= asked.most_tokens and not places else "stop"
    job.deliver(Written(sample, Piece(text), answer.tokens, end=end))


class _Listener(BaseStreamer, StoppingCriteria):
    """Hands each token of `generate()` to a text, and ends with it."""

    def __init__(self, text: Text) -> None:
        self._text, self._has_begun = text, False

    def put(self, value: Tensor) -> None:
        if self._has_begun and not self._text.has_ended:
            self._text.add(int(value.flatten()[-1]))
        self._has_begun = True  # the first ones are those it begins with

    def end(self) -> None:
        if not self._text.has_ended:
            self._text.end("length")

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        done = self._text.has_ended or self._text.job.is_over
        return torch.full((len(input_ids),), done, device=input_ids.device, dtype=torch.bool)


def _write_generated(job: Job, voice: Voice, text: Text) -> None:
    asked, listener = job.asked, _Listener(text)
    ids = torch.tensor([asked.ids], device=voice.mixture.device)
    with torch.random.fork_rng():
        torch.manual_seed(asked.seed + text.sample)
        voice.mixture.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            weights=dict(voice.weights),
            max_new_tokens=asked.most_tokens,
            streamer=listener,
            stopping_criteria=StoppingCriteriaList([listener]),
            **asked.sampling.generation,
        )
