"""Reinforced merging: its rewards by hand, that it learns, and that it is a function of the finished trials."""

from dataclasses import replace

import optuna
import pytest

from emorl.config import UserError
from emorl.fusion.merging_map import MergingSpace
from emorl.search.proposers.optuna_samplers import OptunaProposer
from emorl.search.proposers.reinforced_merging import (
    COLUMN_SCORES,
    PPOSettings,
    ReinforcedMerging,
    dynamic_average,
    paired_rewards,
)
from emorl.search.study import Budget, Finished, Scored, open_study, search

optuna.logging.set_verbosity(optuna.logging.WARNING)

SPACE = MergingSpace(4, 6, allow_skip=True)
BEST = ((0, 2), (1, 0), (3, 3), (4, 1), (5, 2))  # layer 2 is best skipped
SHORT = PPOSettings(episodes=30, plans_per_update=5, epochs=2)


def value(finished):
    return [trial.scores[0] for trial in finished]


def score(params, space=SPACE):
    """The share of layers with the best action."""
    chosen, best = dict(space.plan(params)), dict(BEST)
    return sum(chosen.get(layer) == best.get(layer) for layer in range(space.layers)) / space.layers


def evaluate(candidates):
    return [Scored((score(params),)) for params in candidates]


def finish(number, params, **notes):
    return Finished(number, params, (score(params),), notes)


def make(seed=0, space=SPACE, settings=SHORT):
    return ReinforcedMerging(space, value, seed, settings)


def run(proposer, finished=(), limit=1000):
    """A one-worker search, one candidate at a time."""
    finished = list(finished)
    while len(finished) < limit and (proposed := proposer(finished)) is not None:
        known = [trial.params for trial in finished]
        finished.append(finish(len(finished), next(params for params in proposed if params not in known)))
    return finished


def run_study(path, settings=SHORT, trials=None, evaluate=evaluate):
    study = open_study(path, ["score"], "plans")
    return search(study, make(settings=settings), evaluate, SPACE.distributions, batch=8, budget=Budget(trials=trials))


def test_it_finds_the_best_plan_with_a_layer_that_is_best_skipped(tmp_path):
    finished = run_study(tmp_path / "journal.log", PPOSettings(episodes=160))
    best = max(finished, key=lambda trial: trial.scores)
    assert SPACE.plan(best.params) == BEST
    assert len(finished) < 160  # of 15624 plans


RULES = {"paired": SHORT, "dynamic_average": replace(SHORT, reward="dynamic_average", episodes_per_pass=10)}


@pytest.mark.parametrize("settings", RULES.values(), ids=RULES)
def test_ended_by_its_budget_and_resumed_it_makes_the_same_trials(tmp_path, settings):
    whole = run_study(tmp_path / "whole.log", settings)
    for stop in (2, 18):
        assert run_study(tmp_path / "stopped.log", settings, trials=stop) == whole[:stop]
    assert run_study(tmp_path / "stopped.log", settings) == whole


def test_stopped_in_the_middle_of_a_batch_it_goes_on_with_the_same_plans(tmp_path):
    batches = []

    def stopping(candidates):
        batches.append(candidates)
        if len(batches) == 4:
            raise KeyboardInterrupt
        return evaluate(candidates)

    with pytest.raises(KeyboardInterrupt):
        run_study(tmp_path / "stopped.log", evaluate=stopping)
    resumed, whole = run_study(tmp_path / "stopped.log"), run_study(tmp_path / "whole.log")
    assert len(resumed) > 4 + 3 * 5
    assert {tuple(SPACE.vector(trial.params)) for trial in resumed} == {tuple(SPACE.vector(trial.params)) for trial in whole}


def test_the_same_seed_gives_the_same_search_and_another_one_another():
    assert run(make(3)) == run(make(3))
    assert run(make(3)) != run(make(4))


def test_what_it_keeps_between_calls_changes_nothing():
    kept, finished = make(), []
    while (proposed := kept(finished)) is not None:
        assert proposed == make()(finished)
        finished += [finish(len(finished) + index, params) for index, params in enumerate(proposed[:2])]
    assert make()(finished) is None


def test_trials_of_others_are_taken_in_whenever_they_finish():
    plans = [((layer, column), (5, column)) for layer in range(3) for column in range(4)]
    others = [finish(number, SPACE.params(plan)) for number, plan in zip(range(0, 60, 5), plans, strict=True)]
    numbers = [number for number in range(60) if number % 5]
    kept, finished = make(), []
    while (proposed := kept(sorted(finished, key=lambda trial: trial.number))) is not None:
        assert proposed == make()(sorted(finished, key=lambda trial: trial.number))
        known = [trial.params for trial in finished]
        finished += [finish(numbers.pop(0), params) for params in proposed if params not in known]
        finished += [trial for trial in [others.pop()] if trial.params not in known] if others else []
        if len(numbers) < 6:
            break
    assert len(finished) > 30


def test_it_begins_with_each_column_alone_and_then_asks_for_one_update_at_a_time():
    finished = [finish(number, params) for number, params in enumerate(SPACE.corners())]
    assert make()([]) == SPACE.corners()
    assert make()(finished[:3]) == SPACE.corners()[3:]
    batch = make()(finished)
    assert 1 < len(batch) <= SHORT.plans_per_update
    assert make()([*finished, finish(4, batch[1])]) == [batch[0], *batch[2:]]


def test_it_ends_when_no_plan_is_new_and_known_plans_cost_nothing():
    space = MergingSpace(2, 1)
    proposer = ReinforcedMerging(space, value, 0, PPOSettings())
    finished = [Finished(number, params, (float(number),), {}) for number, params in enumerate(space.corners())]
    assert proposer(finished) is None


def test_values_that_are_all_equal_teach_nothing_and_break_nothing():
    proposer, finished = make(), []
    while (proposed := proposer(finished)) is not None:
        finished += [Finished(len(finished) + index, params, (0.1,), {}) for index, params in enumerate(proposed)]
    assert len(finished) > len(SPACE.corners())


def test_with_skip_and_back_every_candidate_is_a_plan_within_the_bounds():
    space = MergingSpace(3, 6, allow_skip=True, allow_back=True, max_steps=14, min_depth=3, max_depth=8)
    proposer, finished = make(space=space), []
    while (proposed := proposer(finished)) is not None:
        assert all(3 <= len(space.plan(params)) <= 8 and space.canonical(params) == params for params in proposed)
        finished += [
            Finished(len(finished) + index, params, (score(params, space),), {}) for index, params in enumerate(proposed)
        ]
    assert len(finished) > 15


def test_the_dynamic_average_by_hand():
    settings = PPOSettings(episodes=4, episodes_per_pass=2, strength=0.8)
    assert dynamic_average([1.0, 0.0, 1.0, 0.0], settings) == pytest.approx([1.0, 0.4, 1.0, 0.8])
    assert dynamic_average([1.0, 0.0, 1.0], replace(settings, episodes_per_pass=9)) == pytest.approx([1.0, 0.4, 0.64])


def test_the_dynamic_average_is_the_reward_where_each_episode_sees_all_data():
    assert dynamic_average([3.0, 1.0, 2.0], PPOSettings(episodes=3)) == [3.0, 1.0, 2.0]


def test_rewards_are_paired_with_the_columns_on_the_same_data():
    columns = [Finished(0, {}, (0.2,), {}), Finished(1, {}, (0.4,), {})]
    hard = Finished(2, {}, (0.5,), {COLUMN_SCORES: [[0.1], [0.3]]})
    plain = Finished(3, {}, (0.5,), {})
    assert paired_rewards([*columns, hard, plain], columns, value) == pytest.approx([-0.1, 0.1, 0.3, 0.2])


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("sampler", ["random", "tpe", "cma_es"])
@pytest.mark.parametrize(
    "space", [MergingSpace(3, 6), MergingSpace(3, 6, allow_skip=True, allow_back=True)], ids=["flat", "back"]
)
def test_optuna_samplers_are_rivals_on_the_same_space(sampler, space):
    finished = []
    while len(finished) < 16:
        (params, *_) = OptunaProposer(sampler, space, objectives=1, value=value, seed=0)(finished)
        finished.append(Finished(len(finished), params, (score(params, space),), {}))
    assert [trial.params for trial in finished[:3]] == space.corners()
    assert len({tuple(space.vector(trial.params)) for trial in finished}) == 16
    assert all(space.canonical(trial.params) == trial.params for trial in finished)


@pytest.mark.parametrize(
    ("settings", "message"), [({"episodes": 0}, "episodes: expected at least 1"), ({"reward": "raw"}, "got 'raw'")]
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        PPOSettings(**settings)
