import json
import os
import signal
import subprocess
import sys
import time

import pytest

from emorl.config import UserError
from emorl.runs.run import Cost, only_process, open_run, read_json, write_json, write_text, written_whole


def test_a_run_goes_from_new_to_unfinished_to_finished(tmp_path):
    config = {"a": 1, "b": {"c": [1, 2]}}
    assert not open_run(tmp_path / "r", "train", config).finished
    again = open_run(tmp_path / "r", "train", config)
    assert not again.finished
    again.finish()
    assert open_run(tmp_path / "r", "train", config).finished


def test_cost_before_an_interruption_stays_counted(tmp_path):
    open_run(tmp_path, "train", {}).add_cost(Cost(prompts=3, seconds=1.5))
    open_run(tmp_path, "train", {}).add_cost(Cost(prompts=2, tokens=7))
    assert open_run(tmp_path, "train", {}).cost == Cost(prompts=5, tokens=7, seconds=1.5)


def test_a_run_with_other_settings_is_refused_and_kept(tmp_path):
    open_run(tmp_path, "train", {"train": {"lr": 1, "seed": 0}}).finish()
    before = (tmp_path / "run.json").read_text()
    with pytest.raises(UserError, match=r"other settings \(train.lr: 1 -> 2\); give another `output`"):
        open_run(tmp_path, "train", {"train": {"lr": 2, "seed": 0}})
    assert (tmp_path / "run.json").read_text() == before


def test_a_run_that_failed_at_its_start_does_not_stand_in_the_way(tmp_path):
    open_run(tmp_path, "train", {"data": "wrong.csv"})
    assert open_run(tmp_path, "train", {"data": "right.csv"}).config == {"data": "right.csv"}
    (tmp_path / "checkpoint.safetensors").write_text("work")
    with pytest.raises(UserError, match="other settings"):
        open_run(tmp_path, "train", {"data": "wrong.csv"})


def test_a_damaged_file_of_ours_is_named(tmp_path):
    (tmp_path / "run.json").write_text('{"stage"')
    with pytest.raises(UserError, match=r"run.json is damaged"):
        open_run(tmp_path, "train", {})


def test_a_missing_result_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match="is missing; run the stage that writes it"):
        read_json(tmp_path / "result.json")


def test_versions_are_recorded(tmp_path):
    open_run(tmp_path, "train", {})
    versions = json.loads((tmp_path / "run.json").read_text())["versions"]
    assert versions["emorl"]
    assert versions["trl"].startswith("1.")


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path):
    write_text(tmp_path / "f.txt", "old")

    def write_badly():
        with written_whole(tmp_path / "f.txt") as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError):
        write_badly()
    assert (tmp_path / "f.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["f.txt"]


def test_unicode_survives(tmp_path):
    write_json(tmp_path / "a.json", {"a": "é → 你"})
    assert read_json(tmp_path / "a.json") == {"a": "é → 你"}


def test_a_second_process_is_told_and_a_killed_one_leaves_no_lock(tmp_path):
    code = "import sys, time; from pathlib import Path; from emorl.runs.run import only_process\n"
    code += f"with only_process(Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="being written by another process"), only_process(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    time.sleep(0.05)
    with only_process(tmp_path):
        pass


def test_a_setting_of_a_later_version_that_is_null_is_the_same_run(tmp_path):
    (tmp_path / "work").write_text("done")
    open_run(tmp_path, "train", {"objective": {"function": "length"}}).finish()
    assert open_run(tmp_path, "train", {"objective": {"function": "length", "transform": None}}).finished
    with pytest.raises(UserError, match=r"objective.transform: None -> 'x'"):
        open_run(tmp_path, "train", {"objective": {"function": "length", "transform": "x"}})
