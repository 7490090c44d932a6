"""Texts written by an engine with weights chosen on the way, span by span and, of conversations, turn by turn."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from emorl.dynamic.agents.agent import SpanAgent
from emorl.dynamic.agents.observation import Situation, WeightChooser
from emorl.dynamic.engines.engine import Decoding, Engine
from emorl.policies.conversation import answer_in, as_completion

Turns = Literal["last", "all"]
Span = int | Literal["turn"]
"""tokens between two choices of weights; turn: one choice for each answer"""


@dataclass(frozen=True)
class Answer:
    """One text: which of the prompts asked for it (`row`), the prompt as it was answered, and how it was written."""

    row: int
    turn: int
    prompt: Any
    text: str
    tokens: int
    weights: list[list[float]]  # (spans, K)


@dataclass(frozen=True)
class Decisions:
    """N decisions by prompt, then in the order of time: `SpanAgent.sample`'s tensors, and of which prompt and turn each is,
    both (N,)."""

    data: dict[str, Tensor]
    rows: Tensor
    turns: Tensor


@dataclass
class Rollout:
    """Answers by row and turn, and the seconds they took: all, and those of choosing weights."""

    answers: list[Answer] = field(default_factory=list)
    decisions: Decisions | None = None
    seconds: float = 0.0
    choosing_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(answer.tokens for answer in self.answers)


class Sampler:
    """An agent's sampled actions as a `WeightChooser`, which keeps its decisions. Noise belongs to each text, so a batch
    changes no text's noise.

    Args:
        seeds: of the texts, one each.
    """

    def __init__(self, agent: SpanAgent, seeds: Sequence[int]) -> None:
        self._agent = agent
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.decisions: list[tuple[dict[str, Tensor], Tensor, int]] = []  # decision, rows of the texts, turn

    def __call__(self, situation: Situation) -> Tensor:
        """As `WeightChooser.__call__`."""
        rows = situation.rows[situation.open_]
        noise = torch.stack([torch.randn(self._agent.models, generator=self._generators[row]) for row in rows.tolist()])
        weights, decision = self._agent.sample(situation, noise)
        self.decisions.append((decision, rows, situation.turn))
        return weights


def write(
    engine: Engine,
    prompts: Sequence[Any],
    chooser: WeightChooser,
    decoding: Decoding,
    *,
    span: Span,
    turns: Turns = "last",
    seeds: Sequence[int] | None = None,
) -> Rollout:
    """Answers all prompts as one batch.

    Args:
        turns: `last` answers a conversation as it stands; `all` answers each of its user turns, with our own answers in place
            of those it came with.
        seeds: of the texts' random numbers, where tokens are sampled; 0, 1, … by default.
    """
    start, found = time.perf_counter(), Rollout()
    seeds = list(range(len(prompts)) if seeds is None else seeds)
    questions = [_questions(prompt, turns) for prompt in prompts]
    histories: list[list[dict[str, str]]] = [[] for _ in prompts]
    length = decoding.max_new_tokens if span == "turn" else span
    for turn in range(max(map(len, questions), default=0)):
        rows = [row for row, asked in enumerate(questions) if turn < len(asked)]
        asked = [_with_history(histories[row], questions[row][turn]) for row in rows]
        decoding_now = replace(decoding, seed=decoding.seed + 7919 * turn)
        answers = _write_turn(engine, asked, rows, chooser, decoding_now, length, turn, [seeds[row] for row in rows], found)
        for row, prompt, (written, tokens, weights) in zip(rows, asked, answers, strict=True):
            text = answer_in(written, decoding.after)
            found.answers.append(Answer(row, turn, prompt, text, tokens, weights))
            if not isinstance(prompt, str):
                histories[row] = [*prompt, as_completion(prompt, text)[0]]
    found.answers.sort(key=lambda answer: (answer.row, answer.turn))
    found.seconds = time.perf_counter() - start
    if isinstance(chooser, Sampler) and chooser.decisions:
        found.decisions = _decisions(chooser)
    return found


def _write_turn(
    engine: Engine,
    prompts: Sequence[Any],
    rows: Sequence[int],
    chooser: WeightChooser,
    decoding: Decoding,
    span: int,
    turn: int,
    seeds: Sequence[int],
    found: Rollout,
) -> list[tuple[str, int, list[list[float]]]]:
    """Text, tokens and weights of each prompt; adds the seconds of choosing to `found`."""
    writing = engine.begin(prompts, decoding, seeds)
    previous, of_batch = torch.zeros(len(prompts), len(engine.names)), torch.tensor(rows)
    traces: list[list[list[float]]] = [[] for _ in prompts]
    place = 0
    while not bool((finished := writing.finished).all()):
        open_ = (~finished).nonzero().flatten()
        if engine.device.type == "cuda":  # else the time of choosing would be what the models still have to do
            torch.cuda.synchronize(engine.device)
        start = time.perf_counter()
        weights = chooser(Situation(writing, prompts, of_batch, open_, previous, place, turn, decoding.max_new_tokens))
        found.choosing_seconds += time.perf_counter() - start
        previous = previous.index_copy(0, open_, weights)
        for row, chosen in zip(open_.tolist(), weights.tolist(), strict=True):
            traces[row].append(chosen)
        writing.write(previous, span)
        place += 1
    return list(zip(writing.texts, writing.tokens, traces, strict=True))


def _questions(prompt: Any, turns: Turns) -> list[list[dict[str, str]]] | list[str]:
    """What is asked at each turn: messages that come after the last answer; a text or a whole conversation is one turn."""
    if isinstance(prompt, str):
        return [prompt]
    if turns == "last":
        return [list(prompt)]
    found: list[list[dict[str, str]]] = [[]]
    is_answered = False
    for message in prompt:
        if message["role"] == "assistant":
            is_answered = any(said["role"] == "user" for said in found[-1])
            continue
        if is_answered or (message["role"] == "user" and found[-1] and found[-1][-1]["role"] == "user"):
            found.append([])
        found[-1].append(message)
        is_answered = False
    return found


def _with_history(history: list[dict[str, str]], question: Any) -> Any:
    return question if isinstance(question, str) else [*history, *question]


def _decisions(sampler: Sampler) -> Decisions:
    data, rows, turns = zip(*sampler.decisions, strict=True)
    of_rows = torch.cat(rows)
    of_turns = torch.cat([torch.full_like(some, turn) for some, turn in zip(rows, turns, strict=True)])
    order = of_rows.argsort(stable=True)
    joined = {key: torch.cat([one[key] for one in data])[order] for key in data[0]}
    return Decisions(joined, of_rows[order], of_turns[order])
