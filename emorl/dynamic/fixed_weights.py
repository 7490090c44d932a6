"""The best weights that stay as they are: the rival that a controller must beat, and the baseline of its rewards."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from emorl.dynamic.agents.observation import FixedWeights
from emorl.dynamic.engines.engine import Decoding, Engine
from emorl.dynamic.judging import Judge
from emorl.dynamic.processes import shared_out
from emorl.dynamic.rollout import Answer, Turns, write


def weight_grid(models: int, step: float) -> Tensor:
    """All weights (N, K) on a lattice of the simplex: single models first, then equal weights, then the others.

    `step` is rounded to 1 / n.
    """
    parts = max(1, round(1 / step))
    rows = torch.tensor(list(_compositions(parts, models)), dtype=torch.float32) / parts
    inner = rows[(rows < 1).all(1)]
    equal = torch.full((1, models), 1 / models)
    inner = inner[~torch.isclose(inner, equal).all(1)]
    return torch.cat([torch.eye(models), equal, inner])


def _compositions(total: int, parts: int) -> Iterable[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _compositions(total - first, parts - 1):
            yield (first, *rest)


def values_of_fixed(
    engine: Engine, judge: Judge, data: Dataset, weights: Tensor, decoding: Decoding, turns: Turns, batch: int
) -> NDArray[np.float64]:
    """Value (N, P) of each of N weights (N, K) on each prompt of the data; all together, in batches; shared by processes.

    Of a dialogue of which all turns are answered: the mean over them.
    """
    prompts = list(data["prompt"])
    tasks = [(index, row) for index in range(len(weights)) for row in range(len(prompts))]

    def work(some: Sequence[tuple[int, int]]) -> list[tuple[tuple[int, int], float]]:
        found = []
        for start in range(0, len(some), batch):
            part = some[start : start + batch]
            controller = FixedWeights(weights[[index for index, _ in part]])
            rows = [row for _, row in part]
            written = write(engine, [prompts[r] for r in rows], controller, decoding, span=_WHOLE, turns=turns, seeds=rows)
            values = values_by_task(judge, data, written.answers, rows)
            found += list(zip(part, values, strict=True))
        return found

    table = np.zeros((len(weights), len(prompts)))
    for part in shared_out(tasks, work):
        for (index, row), value in part:
            table[index, row] = value
    return table


_WHOLE = "turn"  # fixed weights have nothing to decide on the way


def values_by_task(judge: Judge, data: Dataset, answers: Sequence[Answer], rows: Sequence[int]) -> list[float]:
    """Of answers to some rows of the data (whose own `row` counts these): the mean value over each one's turns."""
    values = judge.values(judge.scores(data, [replace(answer, row=rows[answer.row]) for answer in answers]))
    by_task: list[list[float]] = [[] for _ in rows]
    for answer, value in zip(answers, values, strict=True):
        by_task[answer.row].append(float(value))
    return [float(np.mean(each)) for each in by_task]


def best_of(weights: Tensor, values: Any) -> tuple[list[float], float]:
    """The weights with the highest mean value, the first of equals, and that value."""
    means = np.asarray(values).mean(1)
    best = int(means.argmax())
    return weights[best].tolist(), float(means[best])
