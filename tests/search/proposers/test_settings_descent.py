"""Coordinate descent over fusion settings."""

import math

from emorl.search.proposers.settings_descent import SettingsDescent
from emorl.search.spaces.fusion_space import FusionSpace
from emorl.search.study import Finished

SPACE = FusionSpace(("a", "b", "c"), ("slerp", "ties"), (0.5, 1.0, 2.0))
BEST = {"weight_a": 0.55, "weight_b": 0.1, "weight_c": 0.35, "method": "ties", "scale": 2.0}


def score(params):
    away = sum((params[name] - BEST[name]) ** 2 for name in ("weight_a", "weight_b", "weight_c"))
    return -away - 0.1 * (params["method"] != "ties") - 0.05 * abs(math.log2(params["scale"]) - 1)


def run(finished=(), limit=1000):
    finished = list(finished)
    proposer = SettingsDescent(SPACE, lambda trials: [trial.scores[0] for trial in trials])
    while len(finished) < limit and (proposed := proposer(finished)) is not None:
        finished += [Finished(len(finished) + i, one, (score(one),), {}) for i, one in enumerate(proposed)]
    return finished


def test_it_finds_the_best_settings_where_there_is_one_hill():
    finished = run()
    assert max(finished, key=lambda trial: trial.scores).params == BEST
    assert len(finished) < 80
    assert len({tuple(SPACE.vector(trial.params)) for trial in finished}) == len(finished)


def test_it_begins_with_the_models_and_goes_on_from_finished_trials_alone():
    whole = run()
    assert [trial.params for trial in whole[:4]] == SPACE.corners()
    assert [trial.params for trial in run(whole[:9])] == [trial.params for trial in whole]
