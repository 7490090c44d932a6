"""DynaOpt: a bandit that moves the weights of the rewards while one policy trains (Min et al. 2024, arXiv 2403.13578).

Two Exp3 bandits: the outer one draws an arm at every validation, one of the objectives or "leave the weights alone", and is
paid by how much the mean validation score has risen since the last one; a drawn objective pays the inner one, whose arm weights
are the reward weights. Departures: the step happens once per interval as in the paper (EMORL's copy repeats it with every
batch), and the untrained policy is validated first, so that the first interval has a reward too.

No state is stored: the weights are computed again from the trainer's log, so that a resumed run goes on as an
uninterrupted one.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SCORE = "score_"
"""before an objective's name among the metrics of a validation"""


class Exp3:
    """The adversarial bandit of Auer et al. 2002: arm weights (N,), of which a share `gamma` of the draws takes no notice."""

    def __init__(self, arms: int, gamma: float) -> None:
        self.weights: NDArray[np.float64] = np.ones(arms)
        self._gamma = gamma

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """(N,), summing to 1."""
        return (1 - self._gamma) * self.weights / self.weights.sum() + self._gamma / len(self.weights)

    def pay(self, arm: int, reward: float) -> None:
        """Equation (3.1) and following: the reward over the arm's probability, in the exponent."""
        estimated = reward / self.probabilities[arm]
        self.weights[arm] *= np.exp(self._gamma * estimated / len(self.weights))


def reward_weights(validations: Sequence[Sequence[float]], gamma: float, seed: int) -> list[float]:
    """Weights (O,) of the rewards, summing to 1, after validations with mean scores (N, O) in the order of their steps.

    The first validation only begins the first interval; the same validations and seed give the same weights.
    """
    objectives = len(validations[0])
    outer, inner, rng = Exp3(objectives + 1, gamma), Exp3(objectives, gamma), random.Random(seed)
    arm: int | None = None
    for index, scores in enumerate(validations):
        if arm is not None:
            outer.pay(arm, float(np.mean(scores) - np.mean(validations[index - 1])))
        [arm] = rng.choices(range(objectives + 1), weights=outer.probabilities.tolist())
        if arm < objectives:
            inner.pay(arm, 1.0)
    return (inner.weights / inner.weights.sum()).tolist()


class DynaOptCallback(TrainerCallback):
    """Sets the reward weights after every validation, and where a resumed training begins."""

    def __init__(self, objectives: Sequence[str], gamma: float, seed: int, set_weights: Callable[[list[float]], None]) -> None:
        self._objectives, self._keys = list(objectives), [f"eval_{SCORE}{name}" for name in objectives]
        self._gamma, self._seed, self._set_weights = gamma, seed, set_weights

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:  # fmt: skip
        self._update(state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:  # fmt: skip
        weights = self._update(state)
        entry = state.log_history[-1]
        entry.update({f"weight_{name}": weight for name, weight in zip(self._objectives, weights, strict=True)})

    def _update(self, state: TrainerState) -> list[float]:
        seen = [[entry[key] for key in self._keys] for entry in state.log_history if self._keys[0] in entry]
        if not seen:
            return []
        weights = reward_weights(seen, self._gamma, self._seed)
        self._set_weights(weights)
        return weights
