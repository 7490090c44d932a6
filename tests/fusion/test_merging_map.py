"""Merging maps: what may be done where, and which parameters stand for which plan."""

import functools
import random

import pytest

from emorl.config import UserError
from emorl.fusion.merging_map import (
    MergingMap,
    MergingSpace,
    action_mask,
    is_finished,
    observation,
    plan_key,
    step,
)

SPACES = [
    MergingSpace(3, 4),
    MergingSpace(2, 5, allow_skip=True),
    MergingSpace(2, 5, allow_skip=True, min_depth=4),
    MergingSpace(2, 4, allow_back=True),
    MergingSpace(3, 4, allow_skip=True, allow_back=True),
    MergingSpace(2, 4, allow_skip=True, allow_back=True, max_steps=7, min_depth=3, max_depth=5),
    MergingSpace(2, 1, allow_skip=True, allow_back=True),
]


def legal(space, at):
    return [action for action, allowed in enumerate(action_mask(space, at)) if allowed]


def play(space, actions):
    return functools.reduce(functools.partial(step, space), actions, MergingMap())


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_any_two_hundred_episodes_end_in_plans_within_the_bounds(space):
    generator = random.Random(0)
    for _ in range(200):
        at = MergingMap()
        while not is_finished(space, at):
            assert all(0 <= entry <= 1 for entry in observation(space, at))
            at = step(space, at, generator.choice(legal(space, at)))
        assert space.min_depth <= len(at.plan) <= space.most_blocks
        assert at.steps <= space.most_steps
        params = space.params(at.plan)
        assert space.plan(params) == at.plan
        assert all(distribution._contains(params[name]) for name, distribution in space.distributions.items())


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_an_action_is_legal_exactly_if_some_plan_can_follow(space):
    @functools.cache
    def can_follow(cursor, depth, steps):
        if steps > space.most_steps or depth > space.most_blocks:
            return False
        if cursor == space.layers:
            return depth >= space.min_depth
        return (
            can_follow(cursor + 1, depth + 1, steps + 1)
            or (space.allow_skip and can_follow(cursor + 1, depth, steps + 1))
            or (space.allow_back and cursor > 0 and can_follow(cursor - 1, depth, steps + 1))
        )

    for cursor in range(space.layers):
        for depth in range(space.most_blocks + 1):
            for steps in range(space.most_steps):
                mask = action_mask(space, MergingMap(((0, 0),) * depth, cursor, steps))
                assert set(mask[: space.columns]) == {can_follow(cursor + 1, depth + 1, steps + 1)}
                assert mask[space.skip] == (space.allow_skip and can_follow(cursor + 1, depth, steps + 1))
                assert mask[space.back] == (space.allow_back and cursor > 0 and can_follow(cursor - 1, depth, steps + 1))


def test_back_uses_a_layer_again_and_is_no_undo():
    space = MergingSpace(2, 3, allow_back=True)
    at = play(space, [0, 1, space.back, 0, 1])
    assert at.plan == ((0, 0), (1, 1), (1, 0), (2, 1))
    assert is_finished(space, at)


def test_a_skipped_layer_is_seen():
    space = MergingSpace(2, 3, allow_skip=True)
    assert observation(space, MergingMap()) != observation(space, play(space, [space.skip]))
    assert play(space, [space.skip]).plan == ()


def test_the_observation_shows_visits_cursor_depth_and_steps():
    space = MergingSpace(2, 2, allow_back=True)
    at = play(space, [1, space.back, 1])
    assert observation(space, at) == [0, 2 / 4, 0, 0, 0, 1, 0, 2 / 4, 3 / 8]


def test_without_skip_and_back_the_parameters_are_the_column_of_each_layer():
    space = MergingSpace(2, 3)
    assert space.params(((0, 1), (1, 0), (2, 1))) == {"step_00": 1, "step_01": 0, "step_02": 1}
    assert [distribution.high for distribution in space.distributions.values()] == [1, 1, 1]
    assert [space.vector(corner) for corner in space.corners()] == [[0, 0, 0], [1, 1, 1]]


def test_all_ways_to_a_plan_are_one_candidate():
    space = MergingSpace(2, 3, allow_skip=True, allow_back=True, max_steps=6)
    direct = [1, space.skip, 0, space.end, space.end, space.end]
    detours = [[1, space.skip, space.back, space.skip, 0, 1], [space.skip, space.back, 1, space.skip, 0, space.end]]
    for way in (direct, *detours):
        assert space.vector(space.canonical(dict(zip(space.names, way, strict=True)))) == direct


def test_illegal_actions_are_passed_over_and_a_way_without_end_is_no_candidate():
    space = MergingSpace(2, 2, allow_back=True, max_steps=4)
    params = dict(zip(space.names, [space.back, 0, space.skip, 1], strict=True))
    assert space.plan(params) == ((0, 0), (1, 1))
    assert space.canonical(dict.fromkeys(space.names, space.end)) is None


def test_plan_keys_are_equal_for_equal_plans_only():
    plans = [((0, 1), (1, 0)), ((0, 1),), ((0, 11),), ((1, 0), (0, 1)), ((0, 1), (1, 0), (1, 0))]
    assert len({plan_key(plan) for plan in plans}) == len(plans)
    assert plan_key(((0, 1), (1, 0))) == "0.1 1.0"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_depth": 5}, "min_depth 5"),
        ({"min_depth": 0}, "min_depth 0"),
        ({"max_depth": 3}, "max_depth 3"),
        ({"allow_back": True, "max_steps": 3}, "at least 4"),
    ],
)
def test_bounds_that_leave_a_column_out_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        MergingSpace(2, 4, **settings)


def test_a_map_without_columns_is_refused():
    with pytest.raises(UserError, match="needs columns"):
        MergingSpace(0, 4)
