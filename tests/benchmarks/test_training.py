"""The training benchmark compares trainings that are the same, and adds up what it says; its timings are not tested."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import bare_trl, training, training_parts
from benchmarks.fusion import Run
from benchmarks.training import check_same, main, training_of, work_of
from benchmarks.training_parts import APART, PARTS, REST, Machine, Sizes, Stopwatch, Work, bounds
from emorl.cli import main as emorl
from emorl.training.allocator import HUGE_PAGES

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


def run_here(*command):
    """A command of the benchmark, in this process: starting one costs more than training in it."""
    module, *rest = command[command.index("-m") + 1 :]
    if module == "benchmarks.bare_trl":
        bare_trl.train(json.loads(Path(rest[0]).read_text()))
    elif module == "emorl":
        assert emorl(rest) == 0
    else:
        assert (module, training_parts.main(rest)) == ("benchmarks.training_parts", 0)
    return Run({"wall": 100.0, "cpu": 50.0}, 2_000_000)


@pytest.fixture
def options(tmp_path, tiny_base_dir, monkeypatch):
    """Of a tiny benchmark in this process, which goes on allocating as it did."""
    monkeypatch.setattr(training, "run", run_here)
    monkeypatch.setenv(HUGE_PAGES, "0")
    rows = [json.dumps({"prompt": f"the number {index}"}) + "\n" for index in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    return ["--base", str(tiny_base_dir), "--prompts", str(tmp_path / "prompts.jsonl"), "--rows", "8", "--generations", "4",
            "--new-tokens", "5", "--steps", "2", "--eval-steps", "1", "--validation", "3",
            "--ways", "trl", "emorl, plain malloc", "--json", str(tmp_path / "told.json")]  # fmt: skip


def test_both_ways_train_the_same_policy(options, tmp_path, capsys):
    assert main([*options, "--repeats", "1"]) == 0  # which refuses to compare others
    told = json.loads((tmp_path / "told.json").read_text())
    assert list(told) == ["trl", "emorl, plain malloc"]
    [theirs], [ours] = told["trl"], told["emorl, plain malloc"]
    assert theirs["validation"] == 0
    assert ours["validation"] > 0
    assert ours["command"] == pytest.approx(100 - ours["validation"])
    assert "| emorl, plain malloc |" in capsys.readouterr().out


def test_the_parts_add_up_to_the_loop(options, tmp_path, capsys):
    assert main([*options, "--profile"]) == 0
    theirs, ours = json.loads((tmp_path / "told.json").read_text()).values()
    assert theirs["work"] == ours["work"]
    assert len(theirs["work"]["completions"]) == 2
    assert work_of(theirs).computed >= work_of(theirs).real > 0
    assert theirs["seconds"].keys() == {*PARTS, "start"}
    assert ours["seconds"].keys() == {*PARTS, *APART}
    assert f"| {REST} |" in capsys.readouterr().out


@pytest.mark.parametrize("changed", ["adapter", "loss"])
def test_other_trainings_are_not_compared(tmp_path, changed):
    log = [{"step": 1, "loss": 0.5, "reward": 0.1, "grad_norm": 1.0, "kl": 0.0, "completions/mean_length": 4.0}]
    ours, theirs = tmp_path / "emorl" / "train" / "vowels", tmp_path / "trl"
    for folder, name in ((ours / "checkpoints", "checkpoint-1"), (theirs, "checkpoint-1")):
        (folder / name).mkdir(parents=True)
        save_file({"a": torch.zeros(3)}, folder / name / "adapter_model.safetensors")
    (theirs / "log.json").write_text(json.dumps(log))
    (ours / "result.json").write_text(json.dumps({"log": log}))
    check_same("emorl", tmp_path, 1)
    if changed == "loss":
        (ours / "result.json").write_text(json.dumps({"log": [{**log[0], "loss": 0.6}]}))
    else:
        adapter = ours / "checkpoints" / "checkpoint-1" / "adapter_model.safetensors"
        save_file({"a": load_file(adapter)["a"] + 0.01}, adapter)
    with pytest.raises(SystemExit, match="not the same training"):
        check_same("emorl", tmp_path, 1)


def test_validations_are_taken_off_by_hand():
    log = [{"eval_runtime": 2.0}, {"loss": 1.0}, {"eval_runtime": 3.0}, {"train_runtime": 15.0}]
    found = training_of(Run({"wall": 20.0, "cpu": 10.0}, 7), log)
    assert vars(found) == {"command": 15.0, "cpu": 7.5, "loop": 10.0, "validation": 5.0, "peak": 7}


def test_a_part_inside_another_is_counted_once():
    now = iter([0.0, 1.0, 5.0, 7.0])
    watch = Stopwatch(lambda: next(now))
    with watch.part("outer"), watch.part("inner"):
        pass
    assert watch.seconds == {"outer": 1.0 + 2.0, "inner": 4.0}


def test_bounds_by_hand():
    work = Work(prompts=[[2, 1]], completions=[[1, 3]], sizes=Sizes(body=100, head=10, lora=5, itemsize=2))
    by_products = bounds(work, Machine(bandwidth=1e9, rate=2.0))  # as many seconds as products
    assert by_products == {
        "sampling": (105 * 3 + 10 * 2) + 115 + 115,  # the prompts; then the longer completion's other two tokens
        "reference": 100 * 7 + 10 * 4,
        "forward": 105 * 7 + 10 * 4,
        "backward": 110 * 7 + 10 * 4,
    }
    by_reading = bounds(work, Machine(bandwidth=1.0, rate=1e9))
    assert by_reading == {"sampling": 3 * 220, "reference": 220, "forward": 220, "backward": 220}
