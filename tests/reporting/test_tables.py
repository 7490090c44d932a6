"""The tables hold the numbers of the files, whole and in words."""

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest

from emorl.config import UserError
from emorl.reporting.results import cost_table, generations, load_run, paired_difference
from emorl.reporting.tables import evaluation_json, print_evaluation, print_front, print_training
from emorl.runs.results import SearchResult, read_result
from emorl.runs.run import read_json, write_json
from tests.reporting.synthetic_run import HOSTILE, OBJECTIVES


@pytest.fixture
def printed(finished_run, capsys):
    print_evaluation(finished_run)
    return capsys.readouterr().out


def test_every_system_is_one_line_with_its_numbers_of_the_summary(printed, finished_run):
    lines = printed.splitlines()
    for row in pd.read_csv(finished_run / "evaluate" / "summary.csv").to_dict("records"):
        line = next(line for line in lines if f" {row['system']} " in line)
        scores = [f"{row[name]:.3f}±{row[f'{name}_error']:.3f}" for name in [*OBJECTIVES, "mean"]]
        rest = [f"{row['minimum']:.3f}", *(f"{row[key]:.2f}" for key in ("distinct_share", "diversity_2", "edit_rate"))]
        rest += [f"{row['words']:.1f}"]
        assert line.split(row["system"])[1].replace("collapsed", "").split() == scores + rest
        assert line.startswith("*") == row["front"]
        assert ("collapsed" in line) == row["collapsed"]


def test_nothing_is_cut_and_lines_stay_within_120_columns(printed):
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_a_narrow_terminal_cuts_no_number(finished_run, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    print_evaluation(finished_run)
    printed = capsys.readouterr().out
    summary = pd.read_csv(finished_run / "evaluate" / "summary.csv")
    for name in [*OBJECTIVES, "mean"]:
        assert all(f"{m:.3f}±{e:.3f}" in printed for m, e in zip(summary[name], summary[f"{name}_error"], strict=True))
    assert "…" not in printed


def test_a_collapsed_policy_is_marked_and_explained(printed):
    assert "policy reflection collapsed" in printed
    assert "collapsed: under 0.8 of the base's share of distinct completions (1.00)" in printed


def test_hypervolume_comes_with_reference_point_and_direction(printed, finished_run):
    recorded = read_json(finished_run / "evaluate" / "result.json")
    for group, volume in recorded["hypervolume"].items():
        assert any(line.split() == [*group.split(), f"{volume:.4g}"] for line in printed.splitlines())
    worst = ", ".join(f"{name} {value:.3f}" for name, value in recorded["reference_point"].items())
    assert f"reference point {worst}; direction: maximise" in printed


def test_a_hacked_objective_and_an_alike_system_are_one_line_each(printed):
    printed = " ".join(printed.split())
    assert "warning reflection: hacked by best fixed response 0.900 (the base's own answers: 0.250); prefers long" in printed
    assert "warning policy reflection: 100% of its answers begin “you feel that”, 100% have a near-duplicate" in printed
    assert "warning empathy" not in printed
    assert "tried: empty, prompt repeated, words shuffled, best fixed response" in printed


def test_cost_has_every_stage_and_their_sum(printed, finished_run):
    assert any(line.split()[:6] == ["train", "empathy", "100", "400", "8,000", "400"] for line in printed.splitlines())
    costs = cost_table(finished_run)
    assert list(costs.index) == ["train reflection", "train empathy", "train fluency", "search", "evaluate", "total"]
    assert costs.loc["total"].to_dict() == pytest.approx(
        {"prompts": 396, "completions": 1936, "tokens": 38720, "reward_calls": 3408, "seconds": 224.25}
    )


def test_the_quickstarts_own_cost_counts_where_it_exists(finished_run, tmp_path):
    copy = shutil.copytree(finished_run, tmp_path / "run")
    cost = {"prompts": 0, "completions": 0, "tokens": 0, "reward_calls": 0, "seconds": 75.75}
    (copy / "quickstart").mkdir()
    write_json(copy / "quickstart" / "cost.json", cost)
    costs = cost_table(copy)
    assert costs.index[0] == "quickstart"
    assert costs.loc["total", "seconds"] == 300


def test_text_of_a_model_is_printed_as_it_is(printed):
    assert HOSTILE in printed


def test_json_holds_the_same_and_no_nan(finished_run):
    content = json.loads(json.dumps(evaluation_json(finished_run), allow_nan=False))
    summary = pd.read_csv(finished_run / "evaluate" / "summary.csv")
    assert [system["system"] for system in content["systems"]] == summary["system"].tolist()
    best = next(system for system in content["systems"] if system["system"] == "ensemble, best found")
    row = summary.set_index("system").loc["ensemble, best found"]
    assert best["scores"]["empathy"] == {"mean": row["empathy"], "error": row["empathy_error"]}
    assert best["weights"] == read_json(finished_run / "search" / "result.json")["best"]["weights"]
    assert content["systems"][0]["weights"] == {}
    assert best["edit_rate"] == row["edit_rate"]
    assert best["perplexity"] is None
    assert content["hacking"] == read_json(finished_run / "evaluate" / "hacking.json")
    assert content["cost"]["total"]["tokens"] == 38720
    assert content["samples"][0]["completions"]["base"] == HOSTILE
    assert list(content["samples"][1]["completions"]) == ["base", *(f"policy {n}" for n in OBJECTIVES), "ensemble, best found"]


def test_the_searchs_front_is_sorted_and_its_best_marked(finished_run, capsys):
    result = read_json(finished_run / "search" / "result.json")
    print_front(read_result(SearchResult, finished_run / "search"))
    lines = capsys.readouterr().out.splitlines()
    rows = [line.replace("*", "").split() for line in lines if line.strip(" *").startswith(("0.", "1."))]
    assert len(rows) == len(result["front"])
    assert [float(row[-1]) for row in rows] == sorted((round(p["value"], 3) for p in result["front"]), reverse=True)
    marked = [line.split()[1:] for line in lines if line.startswith("*") and not line.startswith("* best")]
    best = result["best"]
    assert marked == [[f"{n:.3f}" for n in (*best["weights"].values(), *best["scores"].values(), best["value"])]]
    assert any("search scores on the validation prompts" in line for line in lines)


def test_a_paired_difference_has_a_smaller_error_than_its_parts():
    table = pd.DataFrame(
        {"system": ["a", "a", "b", "b"], "prompt_index": [0, 1, 0, 1], "x": [1.0, 3.0, 0.0, 1.0], "y": [1.0, 3.0, 0.0, 1.0]}
    )
    assert paired_difference(table, "a", "b", ["x", "y"]) == pytest.approx((1.5, 0.5))  # differences 1 and 2


def test_generations_are_the_first_samples_side_by_side():
    table = pd.DataFrame(
        {
            "system": ["a", "a", "b", "b"],
            "prompt_index": [0, 0, 0, 0],
            "sample": [0, 1, 0, 1],
            "prompt": ["hello"] * 4,
            "completion": ["a0", "a1", "b0", "b1"],
        }
    )
    assert generations(table, ["b", "a"], 5).to_dict("split")["data"] == [["b0", "a0"]]


def test_a_directory_without_a_run_says_so(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        print_evaluation(tmp_path)


@pytest.mark.parametrize(("missing", "command"), [("evaluate", "evaluate"), ("search", "run")])
def test_a_missing_stage_names_the_command_to_run(finished_run, tmp_path: Path, missing, command):
    copy = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(copy / "evaluate")
    shutil.rmtree(copy / missing, ignore_errors=True)
    with pytest.raises(UserError, match=f"no finished evaluation; run `emorl {command} .*experiment.yaml` first"):
        evaluation_json(copy)


def test_an_interrupted_comparison_is_not_shown(finished_run, tmp_path):
    copy = shutil.copytree(finished_run, tmp_path / "run")
    manifest = read_json(copy / "evaluate" / "run.json")
    write_json(copy / "evaluate" / "run.json", {**manifest, "finished": False})
    with pytest.raises(UserError, match="no finished evaluation"):
        print_evaluation(copy)


def test_the_base_share_and_the_collapsed_are_read_from_the_summary(finished_run):
    results = load_run(finished_run).evaluated
    assert results.collapsed == ["policy reflection"]
    assert results.base_distinct_share == 1.0
    assert not math.isnan(results.summary.set_index("system").loc["policy empathy", "weight_empathy"])


def test_training_says_why_it_stopped_and_what_was_kept(finished_run, capsys):
    print_training(load_run(finished_run).training)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["empathy", "24", "24", "0.200", "0.650", "0.100", "1.00", "0.95", "max_steps", "reached"] in lines
    assert ["reflection", "collapsed", "24", "24", "0.200", "0.650", "0.100", "1.00", "0.25", "max_steps", "reached"] in lines
