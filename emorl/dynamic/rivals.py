"""What an agent must beat, and the comparison, on test prompts that neither training nor the choice of weights has seen.

Rivals: each model alone, equal weights, the best fixed weights, a router that gives each prompt one model, and the oracle which
knows afterwards which single model was best for each prompt: a bound of routers, not of weights that change within a text.
Every system writes in the same batches with the same engine; seconds include reading the prompts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from emorl.dynamic.agents.agent import SpanAgent
from emorl.dynamic.agents.observation import FixedWeights, WeightChooser
from emorl.dynamic.answer_value import mean_by_row
from emorl.dynamic.processes import shared_out
from emorl.dynamic.rollout import Rollout, Span, write
from emorl.dynamic.router import features_of, fit_router
from emorl.dynamic.setting import Setting
from emorl.policies.conversation import prompt_text
from emorl.runs.progress import Progress
from emorl.runs.results import DynamicSystem, FixedPoint, FixedResult

BEST_FIXED = "best fixed weights"
_ROUTED = 512  # training prompts a router learns from, at most
_RESAMPLES = 4000


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


def values_of_fixed(setting: Setting, data: Dataset, weights: Tensor) -> NDArray[np.float64]:
    """Value (N, P) of each of N weights (N, K) on each prompt of the data; all together, in batches; shared by processes.

    Of a dialogue of which all turns are answered: the mean over them.
    """
    prompts, config = list(data["prompt"]), setting.config
    tasks = [(index, row) for index in range(len(weights)) for row in range(len(prompts))]

    def work(some: Sequence[tuple[int, int]]) -> list[float]:
        means: list[float] = []
        for start in range(0, len(some), config.batch):
            indices, rows = zip(*some[start : start + config.batch], strict=True)
            written = write(
                setting.engine,
                [prompts[row] for row in rows],
                FixedWeights(weights[list(indices)]),
                setting.decoding,
                span="turn",  # there is nothing to decide on the way
                turns=config.turns,
                seeds=rows,
            )
            values = setting.value.values(data, written.answers, rows)
            means += mean_by_row(values, written.answers, len(rows)).tolist()
        return means

    parts = shared_out(tasks, work)
    return np.array([mean for part in parts for mean in part]).reshape(len(weights), len(prompts))


def best_fixed(setting: Setting, progress: Progress) -> FixedResult:
    """The best weights of the grid by the validation prompts."""
    data, names = setting.splits.validation, setting.engine.names
    grid = weight_grid(len(names), setting.config.fixed_step)
    progress.say(f"dynamic: {len(grid)} fixed weights on {len(data)} validation prompts")
    means = values_of_fixed(setting, data, grid).mean(1).tolist()
    tried = [FixedPoint(dict(zip(names, row, strict=True)), mean) for row, mean in zip(grid.tolist(), means, strict=True)]
    best = best_of(tried)
    shown = ", ".join(f"{name} {weight:.2f}" for name, weight in best.weights.items())
    progress.say(f"dynamic: best fixed weights {shown}, value {best.validation:.3f}")
    return FixedResult(best, tried)


def best_of(tried: Sequence[FixedPoint]) -> FixedPoint:
    """The first of those with the highest value."""
    return max(tried, key=lambda point: point.validation)


@dataclass(frozen=True)
class Compared:
    """A system's answers to P test prompts: scores (N, O) of the N answers, and a value (P,) for each prompt."""

    name: str
    chooser: WeightChooser
    span: Span
    rollout: Rollout
    scores: NDArray[np.float64]
    values: NDArray[np.float64]


def compare(
    setting: Setting,
    fixed: Sequence[float],
    agents: Mapping[str, SpanAgent],
    best: str,
    progress: Progress,
) -> list[Compared]:
    """Every system on the test prompts, in every process: single models, other rivals, agents, the best one at other spans.

    Args:
        fixed: the best fixed weights.
        agents: by their kinds; `best` is compared at `dynamic.spans` too.
    """
    names, config = setting.engine.names, setting.config
    equal = torch.full((len(names),), 1 / len(names))
    contenders: list[tuple[str, WeightChooser, Span]] = [
        *((f"{name} alone", FixedWeights(row), "turn") for name, row in zip(names, torch.eye(len(names)), strict=True)),
        ("equal weights", FixedWeights(equal), "turn"),
        (BEST_FIXED, FixedWeights(torch.tensor(fixed)), "turn"),
        ("router per prompt", _learnt_router(setting), "turn"),
        *((f"RLAE-{kind.upper()}", agent, config.span) for kind, agent in agents.items()),
        *((f"RLAE-{best.upper()}", agents[best], span) for span in config.spans if span != config.span),
    ]
    records = []
    with progress.bar("compare", len(contenders)) as bar:
        for name, chooser, span in contenders:
            records.append(_compared(setting, name, chooser, span))
            bar.advance(1, f"{name} {records[-1].values.mean():.3f}")
    return records


def _compared(setting: Setting, name: str, chooser: WeightChooser, span: Span) -> Compared:
    data, ensemble = setting.splits.test, setting.ensemble(chooser, span)
    prompts = list(data["prompt"])

    def work(rows: Sequence[int]) -> tuple[Sequence[int], Rollout]:
        return rows, ensemble.rollout([prompts[row] for row in rows], seeds=rows, batch=setting.config.batch)

    parts = shared_out(range(len(prompts)), work)
    answers = [replace(answer, row=rows[answer.row]) for rows, part in parts for answer in part.answers]
    seconds, choosing = (max(getattr(part, key) for _, part in parts) for key in ("seconds", "choosing_seconds"))
    scores = setting.value.scores(data, answers)
    values = mean_by_row(setting.value.of_scores(scores), answers, len(prompts))
    return Compared(name, chooser, span, Rollout(answers, None, seconds, choosing), scores, values)


def _learnt_router(setting: Setting) -> WeightChooser:
    """Learnt from what every single model earns on training prompts."""
    train = setting.splits.train
    some = train.select(range(min(_ROUTED, len(train))))
    values = values_of_fixed(setting, some, torch.eye(len(setting.engine.names)))  # (K, P)
    agent, config = setting.new_agent("ppo"), setting.config
    features = features_of(agent, setting.engine, list(some["prompt"]), setting.decoding, config.turns, config.batch)
    return fit_router(agent, features, values.T)


def systems_of(records: Sequence[Compared], models: Sequence[str], objectives: Sequence[str]) -> list[DynamicSystem]:
    """What was compared as lines of a table, the oracle before the agents; the single models are the first records."""
    reference = next(record.values for record in records if record.name == BEST_FIXED)
    oracle = np.max([record.values for record in records[: len(models)]], 0)
    systems = []
    for record in records:
        weights = np.array([row for answer in record.rollout.answers for row in answer.weights]).mean(0)
        systems.append(
            DynamicSystem(
                record.name,
                record.span if isinstance(record.chooser, SpanAgent) else None,
                **_measured(record.values, reference),
                scores=dict(zip(objectives, record.scores.mean(0).tolist(), strict=True)),
                mean_weights=dict(zip(models, weights.tolist(), strict=True)),
                tokens=record.rollout.tokens,
                tokens_per_second=record.rollout.tokens / record.rollout.seconds,
                choosing_share=record.rollout.choosing_seconds / record.rollout.seconds,
            )
        )
    first_agent = next(place for place, system in enumerate(systems) if system.span is not None)
    systems.insert(first_agent, DynamicSystem("oracle router", None, **_measured(oracle, reference)))
    return systems


def _measured(values: NDArray[np.float64], reference: NDArray[np.float64]) -> dict[str, Any]:
    gain, low, high = paired_gain(values, reference)
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {"value": float(values.mean()), "error": error, "gain": gain, "gain_low": low, "gain_high": high}


def paired_gain(values: NDArray[np.float64], reference: NDArray[np.float64], seed: int = 0) -> tuple[float, float, float]:
    """Mean gain (of P prompts) on a reference, and its 95 % interval by resampling prompts."""
    gains = values - reference
    drawn = np.random.default_rng(seed).integers(len(gains), size=(_RESAMPLES, len(gains)))
    low, high = np.quantile(gains[drawn].mean(1), [0.025, 0.975])
    return float(gains.mean()), float(low), float(high)


def answers_table(records: Sequence[Compared], objectives: Sequence[str]) -> pd.DataFrame:
    """One row for each answer of each system, with its scores and its weights (spans, K)."""
    return pd.DataFrame(
        [
            {
                "system": record.name,
                "span": str(record.span),
                "prompt_index": answer.row,
                "turn": answer.turn,
                "prompt": prompt_text(answer.prompt),
                "completion": answer.text,
                "tokens": answer.tokens,
                **dict(zip(objectives, scores, strict=True)),
                "weights": answer.weights,
            }
            for record in records
            for answer, scores in zip(record.rollout.answers, record.scores.tolist(), strict=True)
        ]
    )
