"""The scoring benchmark runs and compares ways that give the same scores; its timings are not tested."""

import json

import pytest

from benchmarks.rewards import main, make_ways, measure, padding, synthetic_pairs


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_every_way_is_measured_for_both_objectives(tmp_path, capsys):
    options = ["--size", "tiny", "--texts", "10", "--batch", "4", "--repeats", "1", "--threads", "1",
               "--dtype", "float32", "bfloat16"]  # fmt: skip
    assert main([*options, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["dtype"], row["objective"], row["way"].split(",")[0]) for row in rows] == [
        (dtype, objective, way)
        for dtype in ("float32", "bfloat16")
        for objective in ("classifier", "likelihood")
        for way in ("one by one", "given order", "length-sorted")
    ]
    assert "| likelihood | bfloat16 | length-sorted, 4 |" in capsys.readouterr().out


def test_padding_by_hand():
    pairs = [(letter * size, "") for letter, size in zip("abcd", [1, 900, 1, 900], strict=True)]
    assert padding([1, 9, 1, 9], pairs, 2) == {"one by one": 1.0, "given order, 2": 36 / 20, "length-sorted, 2": 1.0}


def test_synthetic_texts_repeat_with_their_seed_and_spread():
    pairs = synthetic_pairs(200, seed=3)
    words = sorted(len(text.split()) for _, text in pairs)
    assert pairs == synthetic_pairs(200, seed=3) != synthetic_pairs(200, seed=4)
    assert 10 < words[100] < 22
    assert words[-1] > 4 * words[100]


def test_ways_that_disagree_are_not_compared():
    pairs = synthetic_pairs(6, seed=0)
    ways = make_ways(lambda p, t: [0.5] * len(t), lambda p, t: [0.6] * len(t), pairs, 2)
    with pytest.raises(SystemExit, match="given order, 2: a score differs by"):
        measure(ways, 1, lambda: 0.0, 1e-4)
