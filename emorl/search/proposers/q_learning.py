"""RL-Fusion's search (Appl. Sci. 2025, 15(4), 2186): tabular Q-learning over fusion settings, as a proposer.

A walk over the lattice: weights +-1 step, the method, the scale x2 or /2; each move's reward is the gain in value, credited to
the move that caused it (Algorithm 1 read literally credits the next one). Epsilon-greedy "active selection". The walk is a
function of the known values and the seed: a resumed search walks it again from its start, through what is known, to the first
candidate that is not, so nothing needs to be stored. Moves that change nothing are no actions; known states cost nothing.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emorl.search.spaces.fusion_space import METHOD, SCALE, FusionSpace, has_scale
from emorl.search.study import Finished, Params, Valuation

_PATIENCE = 50  # moves among known states before the walk goes on somewhere new
_STEPS_PER_MOVE = (1, 2, 4)  # of the lattice, where the learning rate is bound to the step

Gain = Callable[[Finished, Finished], float]
"""Two finished trials -> how much better the second one is."""


@dataclass(frozen=True)
class QSettings:
    """`alpha` learning rate of the table, `gamma` discount, `epsilon` share of random moves: from the first to the last number
    over `exploration` of the budget. `binding`: what the paper's learning-rate action turns, the fusion's scale, or the step of
    the weights (training-free fusions have no learning rate)."""

    alpha: float = 0.3
    gamma: float = 0.9
    epsilon: tuple[float, float] = (1.0, 0.05)
    exploration: float = 0.6
    binding: str = "scale"


@dataclass(frozen=True)
class _State:
    units: tuple[int, ...]
    method: int
    scale: int
    stride: int


class QLearning:
    """A proposer: one candidate at a time; None when every reachable candidate is known.

    Args:
        budget: evaluations over which exploration ends.
        value: the finished trials -> one value each.
        gain: of a move between two trials; by default the difference of their values, which is paired where all candidates
            see the same prompts.
    """

    def __init__(
        self,
        space: FusionSpace,
        value: Valuation,
        budget: int,
        seed: int,
        settings: QSettings = QSettings(),
        gain: Gain | None = None,
    ) -> None:
        self._space, self._value, self._budget, self._seed = space, value, budget, seed
        self._settings, self._gain = settings, gain
        self._scales = sorted(space.scales)
        self._known: dict[tuple[float, ...], Finished] = {}
        self._values: dict[int, float] = {}  # by trial number
        self.table: dict[_State, np.ndarray] = {}
        """state -> value of each action, NaN where there is none"""
        self._walk = self._walked()

    def __call__(self, finished: Sequence[Finished]) -> list[Params] | None:
        self._known = {tuple(self._space.vector(trial.params)): trial for trial in finished}
        self._values = dict(zip([trial.number for trial in finished], self._value(finished), strict=True))
        missing = [corner for corner in self._space.corners() if tuple(self._space.vector(corner)) not in self._known]
        if missing:
            return list(missing)
        candidate = next(self._walk, None)
        return None if candidate is None else [candidate]

    def _walked(self) -> Iterator[Params]:
        """The walk from its start: stops at each candidate that is not known, for as long as it is not."""
        random = np.random.default_rng(self._seed)
        state = self._start()
        here, seen, idle = self._known[self._key(state)], {self._key(state)}, 0
        while len(self._known) < self._size:
            if idle > _PATIENCE:
                state, idle = self._elsewhere(random), 0
                while self._key(state) not in self._known:
                    yield self._params(state)
                here = self._known[self._key(state)]
            row = self.table.setdefault(state, self._row(state))
            action = self._choose(row, len(seen), random)
            following = self._moved(state, action)
            assert following is not None
            key = self._key(following)
            while key not in self._known:
                yield self._params(following)
            there = self._known[key]
            gain = self._gain(here, there) if self._gain else self._values[there.number] - self._values[here.number]
            best = np.nanmax(self.table.setdefault(following, self._row(following)))
            row[action] += self._settings.alpha * (gain + self._settings.gamma * best - row[action])
            idle = 0 if key not in seen else idle + 1
            seen.add(key)
            state, here = following, there

    @property
    def _size(self) -> int:
        """How many candidates there are."""
        count = len(self._space.models)
        points = 1
        for index in range(1, count):  # compositions of the units: C(units + K - 1, K - 1)
            points = points * (self._space.units + index) // index
        return points * sum(len(self._scales) if has_scale(method) else 1 for method in self._space.methods)

    def _start(self) -> _State:
        equal = self._space.corners()[-1]
        units = tuple(round(weight * self._space.units) for weight in self._space.weights(equal))
        return _State(units, 0, self._scales.index(self._space.default_scale), 0)

    def _elsewhere(self, random: np.random.Generator) -> _State:
        """A random candidate that is not known yet (there is one)."""
        count = len(self._space.models)
        while True:
            cuts = np.sort(random.choice(self._space.units + count - 1, count - 1, replace=False))
            edges = [-1, *cuts.tolist(), self._space.units + count - 1]
            units = tuple(right - left - 1 for left, right in itertools.pairwise(edges))
            method, scale = random.integers(len(self._space.methods)), random.integers(len(self._scales))
            state = self._settled(_State(units, int(method), int(scale), 0))
            if self._key(state) not in self._known:
                return state

    def _params(self, state: _State) -> dict[str, Any]:
        return self._space.params(state.units, self._space.methods[state.method], self._scales[state.scale])

    def _key(self, state: _State) -> tuple[float, ...]:
        return tuple(self._space.vector(self._params(state)))

    def _settled(self, state: _State) -> _State:
        """A method without a scale has the default one."""
        if has_scale(self._space.methods[state.method]):
            return state
        return _State(state.units, state.method, self._scales.index(self._space.default_scale), state.stride)

    def _actions(self) -> list[tuple[str, int]]:
        """Raise and lower each model's weight (the first's alone where there are two), other methods, learning rate."""
        count = len(self._space.models)
        weights = [(kind, model) for model in range(count if count > 2 else 1) for kind in ("raise", "lower")]
        methods = [(METHOD, offset) for offset in range(1, len(self._space.methods))]
        return [*weights, *methods, (SCALE, 1), (SCALE, -1)]

    def _row(self, state: _State) -> np.ndarray:
        """Actions start slightly above what is known to be possible, so that each is tried; NaN: no action here."""
        return np.array([np.nan if self._moved(state, a) is None else 1e-3 for a in range(len(self._actions()))])

    def _choose(self, row: np.ndarray, evaluated: int, random: np.random.Generator) -> int:
        first, last = self._settings.epsilon
        progress = min(1.0, evaluated / max(1.0, self._settings.exploration * self._budget))
        possible = np.flatnonzero(~np.isnan(row))
        if random.random() < first + (last - first) * progress:
            return int(random.choice(possible))
        return int(random.choice(np.flatnonzero(row == np.nanmax(row))))

    def _moved(self, state: _State, action: int) -> _State | None:
        """Where an action leads; None where it would change nothing."""
        kind, which = self._actions()[action]
        if kind == METHOD:
            method = (state.method + which) % len(self._space.methods)
            return self._settled(_State(state.units, method, state.scale, state.stride))
        if kind == SCALE:
            return self._rate_changed(state, which)
        units, others = list(state.units), [index for index in range(len(state.units)) if index != which]
        step = _STEPS_PER_MOVE[state.stride]
        if kind == "raise":
            giver = max(others, key=lambda index: (units[index], -index))
            step = min(step, units[giver])
            units[which], units[giver] = units[which] + step, units[giver] - step
        else:
            taker = min(others, key=lambda index: (units[index], index))
            step = min(step, units[which])
            units[which], units[taker] = units[which] - step, units[taker] + step
        return None if step == 0 else _State(tuple(units), state.method, state.scale, state.stride)

    def _rate_changed(self, state: _State, by: int) -> _State | None:
        if self._settings.binding == "step":
            stride = state.stride + by
            in_range = 0 <= stride < len(_STEPS_PER_MOVE)
            return _State(state.units, state.method, state.scale, stride) if in_range else None
        scale = state.scale + by
        if not has_scale(self._space.methods[state.method]) or not 0 <= scale < len(self._scales):
            return None
        return _State(state.units, state.method, scale, state.stride)
