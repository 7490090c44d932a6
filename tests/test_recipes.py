"""Every experiment file in the repository parses; every recipe runs for two steps through the real command line."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from emorl.cli import main
from emorl.config.experiment import load_experiment
from emorl.config.reward import load_refresh_experiment, load_reward_experiment
from recipes.read_answers import main as read_answers
from recipes.rl_fusion.compare import main as compare_fusions
from recipes.rmm.search import main as search_plans

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")
YAMLS = [path for path in ROOT.rglob("*.yaml") if not {".venv", "runs", "node_modules"} & set(path.parts)]


def test_recipes_are_found():
    assert EXPERIMENTS
    assert len(YAMLS) > len(EXPERIMENTS)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_an_experiment_file_parses_and_has_a_readme(path):
    content = yaml.safe_load(path.read_text())
    load = load_refresh_experiment if "reward" in content else load_reward_experiment if "loss" in content else load_experiment
    load(path)
    assert (path.parent / "README.md").is_file()


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_yaml_file_is_yaml(path):
    assert yaml.safe_load(path.read_text()) is not None


@pytest.mark.realdata
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.skipif(not (ROOT.parent / "shared" / "models").is_dir(), reason="needs ../shared")
def test_the_counselling_recipe_runs_for_two_steps(tmp_path, monkeypatch):
    """On the real policy and prompts; its reward models are trained by hand, so rules stand in for two of them."""
    monkeypatch.chdir(ROOT)
    short = ["train.grpo.max_steps=2", "train.grpo.eval_steps=2", "train.grpo.per_device_train_batch_size=8",
             "train.grpo.num_generations=4", "generation.max_new_tokens=8", "search.levels=1", "data.validation=4",
             "data.test=4", "objectives.reflection=distinct_2", "objectives.empathy=length", f"output={tmp_path}"]  # fmt: skip
    assert main(["run", "recipes/counselling/experiment.yaml", *short]) == 0
    assert json.loads((tmp_path / "search" / "result.json").read_text())["trials"] == 19
    assert (tmp_path / "report" / "report.html").exists()


@pytest.mark.realdata
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.skipif(not (ROOT.parent / "shared" / "models").is_dir(), reason="needs ../shared")
def test_the_papers_recipe_compares_for_two_steps_on_two_cores(tmp_path, tiny_seq2seq_dir, monkeypatch):
    """On the real prompts; its base and its reward models are trained by hand, so a random T5 and rules stand in for them."""
    monkeypatch.chdir(ROOT)
    short = ["train.scst.max_steps=2", "train.scst.eval_steps=2", "train.scst.per_device_train_batch_size=2",
             "generation.max_new_tokens=4", "search.levels=1", "data.validation=4", "data.test=4", "compare.seeds=[0]",
             "compare.methods=[ensemble, soups, scaled_soups, gdpo]", "compare.bootstrap=100", f"base.model={tiny_seq2seq_dir}",
             "objectives={reflection: distinct_2, empathy: length}", f"output={tmp_path}"]  # fmt: skip
    assert main(["compare", "recipes/emorl_paper/cpu.yaml", *short, "--json"]) == 0
    assert list(json.loads((tmp_path / "compare" / "result.json").read_text())["methods"]) == [
        "base", "policies alone", "ensemble", "soups", "scaled_soups", "gdpo"
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_rl_fusion_compares_a_few_candidates(tmp_path, tiny_base_dir, make_causal_model, write_adapter, capsys):
    """On random policies; the real ones come from `emorl compare`."""
    (tmp_path / "prompts.csv").write_text("prompt\n" + "\n".join(f"say {i}" for i in range(12)))
    for seed, name in enumerate(("short", "varied")):
        write_adapter(make_causal_model("llama"), tmp_path / "seed-0" / "train" / name / "policy", seed=seed)
    short = [f"base.model={tiny_base_dir}", "objectives={short: length, varied: distinct_2}", f"output={tmp_path / 'out'}",
             f"data={{path: {tmp_path / 'prompts.csv'}, validation: 2, test: 2}}", "fuse.trials=5",
             "generation.max_new_tokens=4"]  # fmt: skip
    compare_fusions(["recipes/rl_fusion/experiment.yaml", *short, "--seeds", "0", "--policies", f"{tmp_path}/seed-{{seed}}"])
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert dict(zip(table["method"], table["evaluations"], strict=True)) == {
        "q_learning": 5, "random": 5, "tpe": 5, "cma_es": 5, "settings_descent": 5,
        "reinforced_merging": 5, "coordinate_descent": 5,
        "equal linear": 0, "equal slerp": 0, "equal ties": 0,
    }  # fmt: skip
    assert "q_learning" in capsys.readouterr().out


def test_reinforced_merging_of_classifiers_tries_a_few_plans(tmp_path, capsys):
    short = ["--plans", "8", "--steps", "2", "--examples", "40", "--shares", "1.0", "0.1"]
    search_plans(["vision", "--seeds", "0", *short, "--output", str(tmp_path)])
    table = pd.read_csv(tmp_path / "vision.csv")
    found = table.groupby("search")["examples"].max()
    assert {"rmm 100%", "rmm 10%", "rmm 10%, DAR", "random", "tpe", "cma_es", "coordinate descent"} <= set(found.index)
    assert "rmm 10%" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["grpo", "scst"])
def test_two_processes_train_one_policy(tmp_path, tiny_base_dir, tiny_seq2seq_dir, kind):
    """`torchrun` on CPU; with one process the completions would be half as many."""
    base, batch = (tiny_base_dir, 4) if kind == "grpo" else (tiny_seq2seq_dir, 1)  # 4 completions each
    (tmp_path / "prompts.csv").write_text("prompt\n" + "\n".join(f"say {i}" for i in range(12)))
    overrides = {
        "output": str(tmp_path / "run"), "base": {"model": str(base)}, "objectives": {"short": "length"},
        "data": {"path": str(tmp_path / "prompts.csv"), "validation": 2, "test": 2},
        "generation": {"max_new_tokens": 4, "do_sample": False},
        "train": {
            "lora": {"r": 4, "target_modules": "all-linear"},
            kind: {"max_steps": 2, "eval_steps": 2, "per_device_train_batch_size": batch, "num_generations": 4},
        },
    }  # fmt: skip
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(overrides))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "recipes/train_policy.py"]
    done = subprocess.run([*command, str(tmp_path / "experiment.yaml")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    cost = json.loads((tmp_path / "run" / "train" / "short" / "cost.json").read_text())
    validations = 2 * 2
    assert cost["completions"] == 2 * (2 * 4) + validations
    assert cost["prompts"] == 2 * 2 + validations


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_two_processes_share_the_sampling_and_train_offline(tmp_path, tiny_base_dir, capsys):
    """Who draws an answer changes nothing: the samples are those of one process."""
    (tmp_path / "prompts.csv").write_text("prompt\n" + "\n".join(f"say {i}" for i in range(12)))
    content = {
        "output": str(tmp_path / "run"), "base": {"model": str(tiny_base_dir)},
        "objectives": {"letters": "tests.training.test_dpo:letters"},
        "data": {"path": str(tmp_path / "prompts.csv"), "validation": 2, "test": 2},
        "generation": {"max_new_tokens": 6, "do_sample": False},
        "train": {
            "method": "dpo",
            "lora": {"r": 4, "target_modules": "all-linear"},
            "dpo": {"max_steps": 2, "eval_steps": 2, "per_device_train_batch_size": 2},
            "samples": {"per_prompt": 6, "batch": 12, "choose": "all"},
        },
    }  # fmt: skip
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29741"]
    arguments = ["recipes/train_policy.py", str(tmp_path / "experiment.yaml")]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "run" / "train" / "letters" / "result.json").read_text())
    assert result["steps"] == 2
    assert result["prompts_per_step"] == 4  # pairs, of both processes
    read_answers([str(tmp_path / "experiment.yaml"), "--shown", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[::2]] == ["== base", "== letters"]
    assert main(["samples", str(tmp_path / "experiment.yaml"), f"output={tmp_path / 'alone'}"]) == 0
    shared, alone = (pd.read_parquet(tmp_path / run / "samples" / "samples.parquet") for run in ("run", "alone"))
    pd.testing.assert_frame_equal(shared, alone)
    costs = [json.loads((tmp_path / run / "samples" / "cost.json").read_text()) for run in ("run", "alone")]
    assert costs[0]["completions"] == costs[1]["completions"] == 8 * 6
