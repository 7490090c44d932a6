"""One thread that decodes all requests: it reads new prompts in pieces, and writes a token of every text between two pieces.

Requests of one mixture that compute the same policies are one batch, whatever their weights (`RowBatch`). What cannot join one,
an encoder-decoder or a dynamic ensemble, is answered one request after the other.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emorl.aggregation.known_prompts import KnownPrompts
from emorl.aggregation.row_batch import PromptReading, RowBatch
from emorl.aggregation.sampling import choose
from emorl.config import UserError
from emorl.config.serve import ServeConfig
from emorl.serving.alone import Alone
from emorl.serving.jobs import Asked, BusyError, Event, Job, PromptScores, Text
from emorl.serving.token_scores import TokenScore, token_scores
from emorl.serving.voices import Voice

logger = logging.getLogger(__name__)

_IDLE_SECONDS = 0.5  # between two looks whether a client has gone, while nothing is to do
_ROOM = 1.6  # what buffers take over what they hold, as they grow by quarters in rows and in tokens
_KNOWN_SHARE = 0.25  # of the memory, for prompts that may come again


@dataclass
class _Reading:
    """A request whose prompt is to be read, and the scores of its tokens where they are asked for. Where it begins is looked up
    when its turn comes: those before it may have read the same."""

    job: Job
    prompt: PromptReading | None = None
    read_last: int = 1
    """tokens, the last time"""
    scores: list[TokenScore] = field(default_factory=list)


@dataclass
class _Lane:
    """Texts that are one batch, in the order of its rows."""

    rows: RowBatch
    texts: list[Text] = field(default_factory=list)


class Engine:
    """Takes requests from any thread; what becomes of them goes to each one's `deliver`, in the engine's thread.

    Args:
        memory: bytes for keys and values.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limits: ServeConfig, memory: int) -> None:
        self._tokenizer, self._limits = tokenizer, limits
        self._memory = int(memory * (1 - _KNOWN_SHARE))
        self._known = KnownPrompts(int(memory * _KNOWN_SHARE))
        self._waiting: deque[deque[Job]] = deque()  # by request: each gets its turn
        self._reading: list[_Reading] = []
        self._lanes: dict[Hashable, _Lane] = {}
        self._change = threading.Condition()
        self._is_closing = False
        self._running = 0  # what other threads may know
        self._alone = Alone(tokenizer)
        self._thread = threading.Thread(target=self._run, name="emorl-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._alone.start()

    def close(self, seconds: float) -> None:
        """Takes nothing more, and waits for what runs."""
        with self._change:
            self._is_closing = True
            self._change.notify()
        self._thread.join(seconds)
        self._alone.close(seconds)

    def submit(self, wanted: Sequence[Asked], deliver: Callable[[int, Event], None]) -> list[Job]:
        """What a request asks for, all of it or nothing. `deliver` is told the place in it that an event is of.

        Raises:
            BusyError: too many wait already, or the server is closing.
            UserError: it would not fit alone.
        """
        for asked in wanted:
            self._check_size(asked)
        deadline = time.monotonic() + self._limits.seconds
        jobs = [Job(asked, partial(deliver, place), deadline) for place, asked in enumerate(wanted)]
        with self._change:
            if self._is_closing:
                raise BusyError("the server is shutting down")
            if self.waiting >= self._limits.queue:
                raise BusyError(f"{self.waiting} requests are waiting already")
            for job in jobs:
                if not job.asked.joins:
                    self._alone.submit(job)
            if joining := deque(job for job in jobs if job.asked.joins):
                self._waiting.append(joining)
                self._change.notify()
        return jobs

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting) + self._alone.waiting

    @property
    def running(self) -> int:
        """Texts that are being read or written, as of the last step."""
        return self._running + self._alone.running

    def _check_size(self, asked: Asked) -> None:
        if asked.samples > self._limits.rows:
            raise UserError(f"n={asked.samples} is more than the {self._limits.rows} texts that are written side by side")
        needed = _bytes_of(asked, asked.places)
        if needed > self._memory:
            raise UserError(
                f"{asked.samples} x {asked.places} tokens need {needed / 2**30:.2f} GiB of cache, and there are "
                f"{self._memory / 2**30:.2f}; ask for fewer tokens, or raise serve.memory"
            )

    def _run(self) -> None:
        while True:
            with self._change:
                has_work = self._waiting or self._reading or any(lane.texts for lane in self._lanes.values())
                if not has_work:
                    if self._is_closing:
                        return
                    self._change.wait(_IDLE_SECONDS)
                    continue
            in_work = [each.job for each in self._reading] + [text.job for lane in self._lanes.values() for text in lane.texts]
            if not self._guarded(in_work, self._turn):
                self._reading, self._lanes = [], {}
            self._running = self._rows

    def _turn(self) -> None:
        """Some reading, and a token for every text."""
        self._forget_gone()
        self._admit()
        self._running = self._rows
        self._read()
        for kind in list(self._lanes):
            self._step(kind)

    @property
    def _rows(self) -> int:
        """Texts that are being read or written."""
        return sum(len(lane.texts) for lane in self._lanes.values()) + sum(each.job.asked.samples for each in self._reading)

    def _guarded(self, jobs: Sequence[Job], work: Callable[..., None], *arguments: Any) -> bool:
        """Whether work was done; what goes wrong ends the requests that it was done for, neither others nor the thread."""
        try:
            work(*arguments)
        except Exception as error:  # of torch, transformers or a tokenizer: the others must go on
            logger.exception("a request could not be answered")
            for job in dict.fromkeys(jobs):
                job.fail(error)
            return False
        return True

    def _forget_gone(self) -> None:
        """Frees the rows of those whose client has gone."""
        with self._change:
            staying = (deque(job for job in request if not job.is_gone) for request in self._waiting)
            self._waiting = deque(request for request in staying if request)
        self._reading = [each for each in self._reading if not each.job.is_gone]
        for kind in list(self._lanes):
            self._remove(kind, [row for row, text in enumerate(self._lanes[kind].texts) if text.job.is_gone])

    def _admit(self) -> None:
        """Lets in who waits, in order, while there are rows and memory."""
        while self._waiting:
            asked = self._waiting[0][0].asked
            if self._rows + asked.samples > self._limits.rows or self._bytes_with(asked) > self._memory:
                return
            with self._change:
                request = self._waiting.popleft()
                self._reading.append(_Reading(request.popleft()))
                if request:  # its other prompts wait behind those of others
                    self._waiting.append(request)

    def _bytes_with(self, asked: Asked) -> int:
        """What the caches take now, or will at their longest: rows of a batch are as long as its longest text."""
        to_read = [asked, *(each.job.asked for each in self._reading)]
        written = [text.job.asked for lane in self._lanes.values() for text in lane.texts]
        longest = max(each.places for each in [*to_read, *written])
        total = sum(_bytes_of(each, longest) for each in to_read)
        for lane in self._lanes.values():
            per_place = sum(text.job.asked.bytes_per_place for text in lane.texts)
            total += max(lane.rows.bytes, int(_ROOM * longest * per_place))
        return total

    def _read(self) -> None:
        """Some tokens of the prompts that wait to be read, first come first served."""
        left = self._limits.chunk
        while self._reading and left > 0:
            each = self._reading[0]
            if not self._guarded([each.job], self._read_of, each, left) or (each.prompt and each.prompt.is_read):
                self._reading.remove(each)
            left -= each.read_last

    def _read_of(self, each: _Reading, most: int) -> None:
        asked = each.job.asked
        if each.prompt is None:
            assert isinstance(asked.voice, Voice)
            known = [] if asked.scores_prompt else self._known.beginning(_kind(asked), asked.ids)
            each.prompt = PromptReading(asked.voice.mixture, asked.ids, asked.voice.row, known)
        start = each.prompt.read_tokens
        logits = each.prompt.read(most, keep=0 if asked.scores_prompt else 1)
        each.read_last = each.prompt.read_tokens - start
        if asked.scores_prompt:
            following = asked.ids[start + 1 : each.prompt.read_tokens + 1]
            each.scores += token_scores(self._tokenizer, logits[: len(following)], following, asked.logprobs or 0)
        if each.prompt.is_read:
            self._known.keep(_kind(asked), asked.ids, each.prompt.layers)
            self._begin(each, logits[-1:])

    def _begin(self, each: _Reading, logits: Tensor) -> None:
        """A prompt that is read becomes texts, by the logits (1, V) behind it."""
        assert each.prompt is not None
        if each.job.asked.scores_prompt:
            each.job.deliver(PromptScores(each.scores))
        texts = [Text(each.job, sample, self._tokenizer) for sample in range(each.job.asked.samples)]
        for row in self._chosen(texts, logits.expand(len(texts), -1)):
            self._join(each.prompt, texts[row])

    def _join(self, prompt: PromptReading, text: Text) -> None:
        voice = text.job.asked.voice
        assert isinstance(voice, Voice)
        kind = (id(voice.mixture), prompt.active)
        lane = self._lanes.setdefault(kind, _Lane(RowBatch(voice.mixture, prompt.active)))
        lane.texts.append(text)
        if not self._guarded([each.job for each in lane.texts], lane.rows.join, prompt):
            del self._lanes[kind]  # its layers may hold different rows

    def _step(self, kind: Hashable) -> None:
        lane = self._lanes[kind]
        if not lane.texts:
            return
        if not self._guarded([text.job for text in lane.texts], self._write, lane):
            del self._lanes[kind]  # its cache may be half written
            return
        self._remove(kind, [row for row, text in enumerate(lane.texts) if text.has_ended])

    def _write(self, lane: _Lane) -> None:
        """A token for every text of a batch."""
        self._chosen(lane.texts, lane.rows.step([text.last for text in lane.texts]))

    def _remove(self, kind: Hashable, rows: Sequence[int]) -> None:
        lane = self._lanes[kind]
        if len(rows) == len(lane.texts):
            del self._lanes[kind]
        elif rows:
            lane.texts = [lane.texts[row] for row in lane.rows.leave(rows)]

    def _chosen(self, texts: Sequence[Text], logits: Tensor) -> list[int]:
        """Gives every text its next token, of logits (R, V); the rows that go on."""
        if any(text.job.asked.most_tokens == 0 for text in texts):
            for text in texts:
                text.end("length")
            return []
        shaped = logits
        for row, text in enumerate(texts):
            if text.job.asked.sampling.processors:
                shaped = logits.float().clone() if shaped is logits else shaped
                seen: Any = torch.tensor([[*text.job.asked.ids, *text.ids]], device=logits.device)
                shaped[row] = text.job.asked.sampling.processors(seen, shaped[row : row + 1])[0]
        of = [text.job.asked.sampling for text in texts]
        tokens = choose(
            shaped,
            torch.tensor([each.temperature for each in of], dtype=torch.float32),
            torch.tensor([each.top_p for each in of], dtype=torch.float32),
            torch.tensor([each.top_k for each in of]),
            torch.tensor([text.chance() for text in texts], dtype=torch.float32),
        ).tolist()
        for row, (text, token) in enumerate(zip(texts, tokens, strict=True)):
            asked = text.job.asked
            scores = (
                [] if asked.logprobs is None else token_scores(self._tokenizer, logits[row : row + 1], [token], asked.logprobs)
            )
            text.add(token, scores)
        return [row for row, text in enumerate(texts) if not text.has_ended]


def _bytes_of(asked: Asked, places: int) -> int:
    """What a request takes while its prompt is read and its texts are written, all of so many places."""
    return int(_ROOM * places * (asked.samples + 1) * asked.bytes_per_place)


def _kind(asked: Asked) -> Hashable:
    """What a prompt's keys and values depend on, beside its tokens."""
    voice = asked.voice
    assert isinstance(voice, Voice)
    row = voice.row
    return id(voice.mixture), tuple((row != 0).tolist()) if voice.mixture.has_rows_by_policy else tuple(row.tolist())
