"""A router per prompt, the rival between fixed weights and an agent: one model for the whole answer, chosen by ridge
regression from what an agent sees before the first span to each model's value."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emorl.dynamic.agents.agent import SpanAgent
from emorl.dynamic.agents.observation import Situation
from emorl.dynamic.engines.engine import Decoding, Engine
from emorl.dynamic.rollout import Turns, write


@dataclass(frozen=True)
class Router:
    """A `WeightChooser` that gives all weight to the model with the highest predicted value.

    Args:
        agent: whose features are seen; nothing that it learnt is used.
        mean, scale: of the features, (D,).
        coefficients: (D + 1, K), the last row is the intercept.
    """

    agent: SpanAgent
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    coefficients: NDArray[np.float64]

    def __call__(self, situation: Situation) -> Tensor:
        """As `WeightChooser.__call__`; what was chosen at first stays."""
        if situation.place:
            return situation.previous[situation.open_]
        seen = (first_features(self.agent, situation) - self.mean) / self.scale
        predicted = seen @ self.coefficients[:-1] + self.coefficients[-1]  # (A, K)
        return torch.eye(predicted.shape[1])[torch.from_numpy(predicted.argmax(1))]


def fit_router(agent: SpanAgent, features: NDArray[np.float64], values: NDArray[np.float64]) -> Router:
    """By features (P, D) and the models' values (P, K) on training prompts; the penalty is chosen by leave-one-out error."""
    mean, scale = features.mean(0), np.maximum(features.std(0), 1e-6)
    x, target = (features - mean) / scale, values.mean(0)
    left, singular, right = np.linalg.svd(x, full_matrices=False)
    best: tuple[float, Any] = (np.inf, None)
    for penalty in np.logspace(-1, 5, 13):
        shrink = singular**2 / (singular**2 + penalty)  # (R,)
        fitted = left @ (shrink[:, None] * (left.T @ (values - target)))
        leverage = (left**2 * shrink).sum(1) + 1 / len(x)
        error = float((((values - target - fitted) / np.maximum(1 - leverage, 1e-6)[:, None]) ** 2).mean())
        if error < best[0]:
            best = (error, right.T @ ((singular / (singular**2 + penalty))[:, None] * (left.T @ (values - target))))
    return Router(agent, mean, scale, np.vstack([best[1], target]))


def first_features(agent: SpanAgent, situation: Situation) -> NDArray[np.float64]:
    """What an agent sees of each open text before its first span, (A, D)."""
    seen = agent.observe(situation)
    with torch.no_grad():
        shared, models = agent.features(*(seen[key] for key in agent.keys))
    return torch.cat([shared, models.flatten(1)], 1).double().cpu().numpy()


def features_of(
    agent: SpanAgent, engine: Engine, prompts: Sequence[Any], decoding: Decoding, turns: Turns, batch: int
) -> NDArray[np.float64]:
    """Of prompts, (P, D), as they are seen before the first span of their first turn; one token is written."""
    found: list[NDArray[np.float64]] = []

    def look(situation: Situation) -> Tensor:
        if situation.turn == 0 and situation.place == 0:
            found.append(first_features(agent, situation))
        return torch.full((len(situation.open_), len(engine.names)), 1 / len(engine.names))

    for start in range(0, len(prompts), batch):
        write(engine, prompts[start : start + batch], look, replace(decoding, max_new_tokens=1), span="turn", turns=turns)
    return np.concatenate(found)
