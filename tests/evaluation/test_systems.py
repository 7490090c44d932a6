"""What compared systems add up to."""

import pandas as pd
import pytest

from emorl.evaluation.systems import summary_table
from emorl.runs.results import Kind, System


def table(a, b):
    rows = range(len(a))
    return pd.DataFrame(
        {
            "prompt_index": rows, "sample": 0, "prompt": "why", "completion": [f"answer {row}" for row in rows], "tokens": 3,
            "a": a, "b": b,
        }
    )  # fmt: skip


def test_a_mixture_of_answers_that_are_each_good_at_one_thing_is_told_from_one_of_good_answers():
    """Equal means: one system's answers are all good at one objective, the other's half are good at both."""
    systems = [System("base", Kind.BASE, {}), System("one thing", Kind.ENSEMBLE, {}), System("both", Kind.ENSEMBLE, {})]
    tables = {
        "base": table([0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]),
        "one thing": table([1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]),
        "both": table([1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0]),
    }
    summary = summary_table(systems, tables, ["a", "b"], 0.5).set_index("system")
    assert summary.loc["one thing", "mean"] == pytest.approx(summary.loc["both", "mean"])
    assert summary["all_above_median"].to_dict() == {"base": 0.0, "one thing": 0.0, "both": 0.5}
