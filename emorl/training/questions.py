"""What teacher and student are asked, texts of the teacher's, and how far a student is from them.

The divergence is measured on texts of the teacher's, which stay the same, so that checkpoints, the start and rivals are
compared without noise; and by each model's own forward, as it is used.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.evaluation.scoring import generated_ids
from emorl.policies.generation import end_tokens
from emorl.policies.preference_line import PreferenceLine
from emorl.policies.prompts import token_ids
from emorl.training.anchor import log_probabilities, rows_of_tokens

_ROWS = 4  # texts in one forward: two sets of logits over a large vocabulary are kept


@dataclass(frozen=True)
class Questions:
    """What teacher and student are asked, row by row: the teacher's prompts, weights (N, K), and the student's prompts."""

    teacher: Sequence[Any]
    weights: Tensor
    student: Sequence[Any]

    def as_data(self) -> Dataset:
        """As the trainer reads them."""
        return Dataset.from_dict(
            {"prompt": list(self.student), "asked": list(self.teacher), "weights": self.weights.double().tolist()}
        )


def asked_with(
    prompts: Sequence[Any], weights: Sequence[Sequence[float]], names: Sequence[str], line: PreferenceLine | None
) -> Questions:
    """Each prompt with the weights (N, K) of its row, which a student that reads a line finds in its own prompt."""
    told = prompts
    if line is not None:
        rows = (dict(zip(names, row, strict=True)) for row in weights)
        told = [line.put_into(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
    return Questions(prompts, torch.tensor(weights), told)


def repeated(prompts: Sequence[Any], count: int, seed: int) -> list[Any]:
    """`count` prompts: all of them in random order, again and again."""
    rng = np.random.default_rng(seed)
    passes = -(-count // len(prompts))
    order = np.concatenate([rng.permutation(len(prompts)) for _ in range(passes)])[:count]
    return [prompts[index] for index in order]


@dataclass(frozen=True)
class TeacherTexts:
    """Answers of the teacher as tokens, the prompts behind which it and a student give them, and its weights (N, K)."""

    teacher: Sequence[Sequence[int]]
    student: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    weights: Tensor


@torch.no_grad()
def teacher_texts(
    ensemble: HiddenStateEnsemble,
    tokenizer: PreTrainedTokenizerBase,
    asked: Questions,
    generation: Mapping[str, Any],
    *,
    batch: int,
    seed: int,
) -> TeacherTexts:
    """The ensemble's answers, each up to its first end token; `batch` are decoded at once."""
    answers: list[list[int]] = []
    ends = set(end_tokens(ensemble, tokenizer))
    with torch.random.fork_rng():
        for start in range(0, len(asked.teacher), batch):
            torch.manual_seed(seed + start)
            rows = slice(start, start + batch)
            ids = generated_ids(ensemble, tokenizer, asked.teacher[rows], generation, {"weights": asked.weights[rows]})
            answers += [_written(row, ends, tokenizer.pad_token_id) for row in ids.tolist()]
    teacher, student = ([token_ids(tokenizer, prompt) for prompt in prompts] for prompts in (asked.teacher, asked.student))
    return TeacherTexts(teacher, student, answers, asked.weights)


def _written(row: Sequence[int], ends: Collection[int], pad: Any) -> list[int]:
    """A text up to its first end token, or, where something else has ended it, without the padding behind it."""
    end = next((place for place, token in enumerate(row) if token in ends), None)
    if end is not None:
        return list(row[: end + 1])
    length = next((place + 1 for place in reversed(range(len(row))) if row[place] != pad), 1)
    return list(row[:length])


@torch.no_grad()
def divergences(student: Any, ensemble: HiddenStateEnsemble, texts: TeacherTexts, mixes: bool = False) -> Tensor:
    """KL(ensemble || student) of every text, in nats summed over its tokens, and how many these are: (N, 2).

    Both models are run as they are used, by their own forward; nothing here is TRL's.

    Args:
        student: a policy, or another mixture of the same policies, which then `mixes` by the same weights and reads no line.
    """
    found, asked = [], texts.teacher if mixes else texts.student
    for start in range(0, len(texts.answers), _ROWS):
        rows = slice(start, start + _ROWS)
        weights, answers = texts.weights[rows], texts.answers[rows]
        meant = log_probabilities(ensemble, *rows_of_tokens(texts.teacher[rows], answers), weights=weights)  # (n, V)
        options = {"weights": weights} if mixes else {}
        given = log_probabilities(student, *rows_of_tokens(asked[rows], answers), **options)
        per_token = (meant.exp() * (meant - given)).sum(-1).double().cpu()
        sizes = [len(answer) for answer in answers]
        found += [[float(part.sum()), float(len(part))] for part in per_token.split(sizes)]
    return torch.tensor(found, dtype=torch.float64)
