"""The results of a run directory as data frames, whatever has run in it."""

import math
import shutil
import subprocess
import sys

import pytest

from emorl.config import UserError
from emorl.evaluation.hacking import Attacks
from emorl.reporting.results import load_run
from emorl.runs.results import as_json, read_result
from emorl.runs.run import read_json, write_json
from tests.reporting.synthetic_run import OBJECTIVES, OTHERS


@pytest.fixture
def copy(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("report"))


def test_a_run_that_only_trained_gives_frames_too(copy):
    for stage in ("search", "evaluate"):
        shutil.rmtree(copy / stage)
    results = load_run(copy)
    assert results.ran == ["train"]
    table = results.training_table
    assert list(table.index) == list(OBJECTIVES)
    assert table["collapsed"].tolist() == [True, False, False]
    assert table.loc["empathy", ["base_reward", "reward", "score_empathy", "stopped"]].tolist() == [
        0.2, 0.65, 0.65, "max_steps reached",
    ]  # fmt: skip
    assert math.isnan(table.loc["empathy", "score_fluency"])
    assert results.costs.loc["total", "tokens"] == 3 * 8000
    assert (results.trials, results.summary, results.completions, results.points) == (None, None, None, None)
    assert results.methods_table is None


def test_nothing_trained_here_is_an_empty_table(copy):
    shutil.rmtree(copy / "train")
    assert load_run(copy).training_table.empty


def test_every_stage_gives_its_frames(copy):
    for write in OTHERS.values():
        write(copy)
    results = load_run(copy)
    assert (results.missing, len(results.ran)) == ([], 7)
    frames = (results.trials, results.summary, results.completions, results.fusion_trials, results.points, results.seeds)
    assert [len(frame) > 0 for frame in frames] == [True] * 6
    assert results.dynamic.systems[0].span == 8
    assert results.costs["prompts"].to_dict()["compare"] == 5 + 6
    assert results.methods_table.loc["ensemble", ["reflection", "decode_cost"]].tolist() == [0.25, 0.25]


@pytest.mark.parametrize(
    ("setting", "replaced", "missing"),
    [
        ("", "", ["compare", "fuse", "dynamic", "distill"]),
        ("aggregate: hidden_states", "aggregate: parameters", ["compare", "fuse", "dynamic"]),  # one adapter already
        (
            "policies: null",
            "policies: {run}",
            ["fuse", "dynamic", "distill"],
        ),  # policies of another experiment: no training here
        ("mode: ensemble", "mode: gdpo", ["train"]),  # one policy has no weights
    ],
)
def test_only_stages_that_the_experiment_can_have_are_missing(copy, setting, replaced, missing):
    file = copy / "experiment.yaml"
    text = file.read_text()
    assert setting in text
    file.write_text(text.replace(setting, replaced.format(run=copy)))
    assert load_run(copy).missing == missing


def test_an_interrupted_stage_has_not_run(copy):
    manifest = read_json(copy / "search" / "run.json")
    write_json(copy / "search" / "run.json", {**manifest, "finished": False})
    results = load_run(copy)
    assert (results.ran, results.trials, results.search) == (["train", "evaluate"], None, None)


def test_attacks_are_read_as_they_were_written(copy):
    file = copy / "evaluate" / "hacking.json"
    attacks = load_run(copy).attacks
    assert as_json(attacks) == read_json(file)
    assert attacks.objectives[0].attacks[-1].verdict == "hacked"
    assert math.isnan(attacks.objectives[0].honest.reference_median)
    write_json(file, {**read_json(file), "objectives": [{}]})
    with pytest.raises(UserError, match=r"hacking.json is damaged \(objectives.0.objective: "):
        read_result(Attacks, copy / "evaluate", "hacking.json")


def test_results_are_read_without_torch():
    code = "import emorl.reporting.results, sys; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
