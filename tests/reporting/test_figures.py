"""Figures show the numbers of their data frames."""

import numpy as np
import pandas as pd
import pytest

from emorl.reporting.figures import front_figure, hypervolume_figure, search_trace, ternary_figure, training_figure
from emorl.reporting.results import load_run, validations_table

TRIALS = pd.DataFrame(
    {
        "trial": [0, 1, 2, 3],
        "weight_a": [1.0, 0.0, 0.5, 0.25],
        "weight_b": [0.0, 1.0, 0.5, 0.75],
        "score_a": [0.9, 0.1, 0.6, 0.5],
        "score_b": [0.1, 0.8, 0.6, 0.5],
        "value": [0.5, 0.45, 0.6, 0.5],
        "front": [True, True, True, False],
    }
)
SUMMARY = pd.DataFrame(
    {
        "system": ["base", "policy a", "policy b", "ensemble, best found", "front 1"],
        "kind": ["base", "policy", "policy", "ensemble", "front"],
        "a": [0.1, 0.8, 0.2, 0.6, 0.7],
        "b": [0.2, 0.1, 0.7, 0.6, 0.5],
        "a_error": [0.01, 0.02, 0.03, 0.04, 0.05],
        "b_error": [0.06, 0.07, 0.08, 0.09, 0.10],
    }
)


def _trace(figure, name):
    return next(trace for trace in figure.data if trace.name == name)


def test_front_has_a_trace_per_kind_of_system_with_its_error_bars():
    figure = front_figure(TRIALS, SUMMARY, "a", "b")
    assert len(figure.data) == 2 + 4  # nobody averaged parameters
    policies = _trace(figure, "policies alone")
    assert (list(policies.x), list(policies.y)) == ([0.8, 0.2], [0.1, 0.7])
    assert (list(policies.error_x.array), list(policies.error_y.array)) == ([0.02, 0.03], [0.07, 0.08])
    assert list(policies.text) == ["a", "b"]
    assert "higher is better" in figure.layout.xaxis.title.text
    assert "higher is better" in figure.layout.yaxis.title.text


def test_front_joins_the_undominated_trials_by_a_staircase():
    staircase = _trace(front_figure(TRIALS, SUMMARY, "a", "b"), "their front (validation)")
    assert list(zip(staircase.x, staircase.y, strict=True)) == [(0.1, 0.8), (0.6, 0.6), (0.9, 0.1)]
    assert staircase.line.shape == "vh"  # down first: what lies between two points is dominated only below the lower one


def test_trials_are_coloured_by_value():
    points = _trace(front_figure(TRIALS, SUMMARY, "a", "b"), "search trials (validation)")
    assert list(points.marker.color) == TRIALS["value"].tolist()


def test_search_trace_never_falls():
    best = _trace(search_trace(TRIALS), "best so far")
    assert list(best.y) == [0.5, 0.5, 0.6, 0.6]
    assert list(best.x) == [1, 2, 3, 4]


def test_ternary_map_places_each_policy_at_its_corner_and_rings_the_best(finished_run):
    trials = load_run(finished_run).trials
    figure = ternary_figure(trials, ["reflection", "empathy", "fluency"], "score_empathy", "empathy")
    points, ring = figure.data
    corner = int(np.argmax(points.b))
    assert (points.a[corner], points.b[corner], points.c[corner]) == (0, 1, 0)
    assert points.marker.color[corner] == trials["score_empathy"].max()
    assert (list(ring.a), list(ring.b), list(ring.c)) == ([0], [1], [0])
    assert figure.layout.ternary.baxis.title.text == "empathy"


def test_ternary_map_refuses_two_policies():
    with pytest.raises(ValueError, match="needs three policies, got 2: a, b"):
        ternary_figure(TRIALS, ["a", "b"], "value", "value")


def test_training_shows_validations_the_kept_step_and_the_collapse_line(finished_run):
    table = validations_table(load_run(finished_run).training["reflection"])
    figure = training_figure(table, "reflection", 24, 0.8)
    assert list(_trace(figure, "reward").y) == pytest.approx([0.2, 0.35, 0.5, 0.65])
    assert list(_trace(figure, "distinct share").y) == [1.0, 0.9, 0.5, 0.25]
    horizontal = [shape.y0 for shape in figure.layout.shapes if shape.y0 == shape.y1]
    vertical = {shape.x0 for shape in figure.layout.shapes if shape.x0 == shape.x1}
    assert (horizontal, vertical) == ([0.8], {24})


def test_hypervolume_has_one_bar_per_group_from_the_top():
    (bars,) = hypervolume_figure({"base": 0.0, "policies alone": 0.25, "ensemble": 0.5}).data
    assert dict(zip(bars.y, bars.x, strict=True)) == {"base": 0.0, "policies alone": 0.25, "ensemble": 0.5}
    assert bars.y[-1] == "base"


def test_figures_leave_their_tables_as_they_were():
    before = TRIALS.copy(), SUMMARY.copy()
    front_figure(TRIALS, SUMMARY, "a", "b")
    search_trace(TRIALS)
    pd.testing.assert_frame_equal(TRIALS, before[0])
    pd.testing.assert_frame_equal(SUMMARY, before[1])
