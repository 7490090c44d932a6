"""Merging maps (RMM, arXiv 2503.21272): which block of which model stands where in a merged model.

K columns (fine-tuned models, and whole-model merges of them) of L blocks each. A cursor walks the layers: a column action
appends the cursor's block of that column, skip passes the layer by, back returns to the layer before without removing
anything, so that a layer is used again. Departures from the authors' code: the cursor is observed (their map alone cannot
tell a skipped layer from one still to come), and steps and depth are bounded, by masks that always leave a way to the end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import IntDistribution

from emorl.config import UserError

Plan = tuple[tuple[int, int], ...]
"""(layer, column) of each block of a model, from the first block to the last"""

_VISITS_SHOWN = 4  # a block used more often looks the same in the observation


@dataclass(frozen=True)
class MergingMap:
    """Where an episode stands: the plan so far, the layer the cursor is at (L: finished), the actions taken."""

    plan: Plan = ()
    cursor: int = 0
    steps: int = 0


@dataclass(frozen=True)
class MergingSpace:
    """The plans that can be reached, and their form as parameters: one action after another, padded with `end`.

    Actions 0 to K-1 are the columns; then skip, back and end. Without `allow_back` an episode has L steps, and without
    `allow_skip` too, the parameters are the column of each layer.

    >>> MergingSpace(columns=2, layers=3).params(((0, 1), (1, 0), (2, 1)))
    {'step_00': 1, 'step_01': 0, 'step_02': 1}

    Args:
        max_steps: of an episode with `allow_back`; 4 L by default.
        min_depth: blocks a plan has at least, at most L.
        max_depth: blocks a plan has at most, at least L; 2 L by default.
    """

    columns: int
    layers: int
    allow_skip: bool = False
    allow_back: bool = False
    max_steps: int | None = None
    min_depth: int = 1
    max_depth: int | None = None

    def __post_init__(self) -> None:
        if self.columns < 1 or self.layers < 1:
            raise UserError(f"a merging map needs columns and layers, got {self.columns} and {self.layers}")
        if not 1 <= self.min_depth <= self.layers <= self.most_blocks:
            raise UserError(
                f"min_depth {self.min_depth} and max_depth {self.max_depth}: expected 1 <= min_depth <= {self.layers} "
                "(the number of layers) <= max_depth, so that each column alone is a plan"
            )
        if self.most_steps < self.layers:
            raise UserError(f"max_steps {self.max_steps}: expected at least {self.layers}, the number of layers")

    @property
    def skip(self) -> int:
        return self.columns

    @property
    def back(self) -> int:
        return self.columns + 1

    @property
    def end(self) -> int:
        return self.columns + 2

    @property
    def most_steps(self) -> int:
        if not self.allow_back:
            return self.layers
        return 4 * self.layers if self.max_steps is None else self.max_steps

    @property
    def most_blocks(self) -> int:
        return 2 * self.layers if self.max_depth is None else self.max_depth

    @property
    def names(self) -> list[str]:
        return [f"step_{number:02d}" for number in range(self.most_steps)]

    @property
    def distributions(self) -> dict[str, IntDistribution]:
        highest = self.end if self.allow_back else self.columns - 1 + self.allow_skip
        return {name: IntDistribution(0, highest) for name in self.names}

    def params(self, plan: Plan) -> dict[str, int]:
        """The shortest way to a plan, which stands for all ways to it."""
        actions, cursor = [], 0
        for layer, column in plan:
            actions += [self.skip] * (layer - cursor) + [self.back] * (cursor - layer) + [column]
            cursor = layer + 1
        actions += [self.skip] * (self.layers - cursor)
        assert len(actions) <= self.most_steps, "a plan of this space"
        return dict(zip(self.names, actions + [self.end] * (self.most_steps - len(actions)), strict=True))

    def plan(self, params: Mapping[str, Any]) -> Plan | None:
        """The plan of any parameters: actions that are not legal where they stand are passed over; None: it never ends."""
        reached = MergingMap()
        for action in self.vector(params):
            if is_finished(self, reached):
                break
            if action != self.end and action_mask(self, reached)[action]:
                reached = step(self, reached, action)
        return reached.plan if is_finished(self, reached) else None

    def canonical(self, params: Mapping[str, Any]) -> dict[str, int] | None:
        """The one candidate that stands for all parameters of this plan; None if they reach no plan."""
        plan = self.plan(params)
        return None if plan is None else self.params(plan)

    def corners(self) -> list[dict[str, int]]:
        """Each column alone: every search begins with them."""
        return [self.params(tuple((layer, column) for layer in range(self.layers))) for column in range(self.columns)]

    def vector(self, params: Mapping[str, Any]) -> Sequence[int]:
        """Actions in order."""
        return [params[name] for name in self.names]


def is_finished(space: MergingSpace, at: MergingMap) -> bool:
    return at.cursor == space.layers


def step(space: MergingSpace, at: MergingMap, action: int) -> MergingMap:
    """The map after one legal action; what is not finished has at least one."""
    if action == space.back:
        return MergingMap(at.plan, at.cursor - 1, at.steps + 1)
    appended = () if action == space.skip else ((at.cursor, action),)
    return MergingMap(at.plan + appended, at.cursor + 1, at.steps + 1)


def action_mask(space: MergingSpace, at: MergingMap) -> tuple[bool, ...]:
    """Whether each action (K columns, skip, back) is legal: allowed, and a plan within the bounds can still follow it."""
    column = _can_finish(space, step(space, at, 0))
    skip = space.allow_skip and _can_finish(space, step(space, at, space.skip))
    back = space.allow_back and at.cursor > 0 and _can_finish(space, step(space, at, space.back))
    return (*(column,) * space.columns, skip, back)


def _can_finish(space: MergingSpace, at: MergingMap) -> bool:
    """Whether the steps left suffice for some depth within the bounds: each back costs two and passes one layer more."""
    ahead, depth = space.layers - at.cursor, len(at.plan)
    spare = space.most_steps - at.steps - ahead
    more = spare // 2 if space.allow_back and ahead > 0 and space.layers > 1 else 0
    least = depth if space.allow_skip else depth + ahead
    return spare >= 0 and least <= space.most_blocks and depth + ahead + more >= space.min_depth


def observation(space: MergingSpace, at: MergingMap) -> list[float]:
    """Visits of each block (L K, layer by layer), the cursor one-hot (L + 1), depth and steps: each from 0 to 1."""
    cap = _VISITS_SHOWN if space.allow_back else 1
    visits = [0] * (space.layers * space.columns)
    for layer, column in at.plan:
        visits[layer * space.columns + column] += 1
    cursor = [float(layer == at.cursor) for layer in range(space.layers + 1)]
    return [
        *(min(count, cap) / cap for count in visits),
        *cursor,
        len(at.plan) / space.most_blocks,
        at.steps / space.most_steps,
    ]


def plan_key(plan: Plan) -> str:
    """The same for equal plans only: `layer.column` of each block.

    >>> plan_key(((0, 1), (1, 0)))
    '0.1 1.0'
    """
    return " ".join(f"{layer}.{column}" for layer, column in plan)
