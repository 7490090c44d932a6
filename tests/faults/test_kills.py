"""Fifty SIGKILLs at random moments over all commands that work long: what they leave in the end is what it is without any."""

import json
import random
import shutil
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file

KILLS = {
    "train": 10,
    "offline": 7,
    "search": 8,
    "fuse": 7,
    "dynamic": 7,
    "train-reward": 7,
    "refresh-reward": 6,
    "compare": 5,
    "distill": 7,
}
SPENT = ("prompts", "completions", "tokens", "reward_calls")
REWARDS = """\
def vowels(completions, **columns):
    return [sum(map(text[0]["content"].count, "aeiou")) / 50 for text in completions]

def digits(completions, **columns):
    return [sum(map(str.isdigit, text[0]["content"])) / 50 for text in completions]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_base_dir, save_word_encoder, command):
    """A folder with files for every command, and the policies that all but `train` begin with."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "kill_rewards.py").write_text(REWARDS)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(24)))
    grades = [
        {"prompt": f"p{i // 4}", "response": "good word" if i % 2 else "bad thing", "label": float(i % 2)} for i in range(64)
    ]
    (folder / "graded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in grades))
    save_word_encoder(folder / "encoder", ["good", "bad", "word", "thing", "say", "p"])
    dpo = {"max_steps": 6, "eval_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    samples = {"per_prompt": 24, "batch": 48, "choose": "all"}
    grpo = {"max_steps": 6, "eval_steps": 1, "per_device_train_batch_size": 8, "num_generations": 4, "learning_rate": 1e-2}
    experiment = {
        "base": {"model": str(tiny_base_dir)},
        "data": {"path": "prompts.jsonl", "validation": 4, "test": 4},
        "objectives": {"vowels": "kill_rewards:vowels", "digits": "kill_rewards:digits"},
        "generation": {"max_new_tokens": 4, "do_sample": False},
        "train": {"lora": {"r": 2, "target_modules": "all-linear"}, "grpo": grpo, "dpo": dpo, "samples": samples,
                  "collapse": {"share": 0.0}},
        "search": {"levels": 4, "batch": 1},
        "evaluate": {"attacks": False},
        "fuse": {"proposer": "settings_descent", "trials": 12, "methods": ["slerp"], "scales": [1.0]},
        "dynamic": {"agents": ["ppo"], "ppo": {"updates": 4}},
        "distill": {"weights": {"vowels": 2, "digits": 1}, "trainer": {**dpo, "max_steps": 8}},
        "compare": {"methods": ["ensemble", "uniform"], "seeds": [0], "bootstrap": 100},
    }  # fmt: skip
    (folder / "experiment.yaml").write_text(yaml.safe_dump({**experiment, "output": "run"}))
    reward = {
        "output": "reward", "model": "encoder", "loss": "regression", "data": {"path": "graded.jsonl"},
        "training": {"num_train_epochs": 6, "per_device_train_batch_size": 8},
    }  # fmt: skip
    (folder / "reward.yaml").write_text(yaml.safe_dump(reward))
    policy = {
        **experiment,
        "objectives": {"reward": {"function": "classifier", "model": "reward/model"}},
        "output": "refreshed",
    }
    policy = {key: policy[key] for key in ("base", "data", "objectives", "generation", "train", "output")}
    refresh = {"reward": reward, "policy": policy, "rounds": 1, "negatives": 8, "retraining": {"num_train_epochs": 2}}
    (folder / "refresh.yaml").write_text(yaml.safe_dump(refresh))
    done = command("train", "experiment.yaml", "output=policies", folder=folder)
    assert done["code"] == 0, done["error"]
    return folder


def arguments_of(name, output):
    experiment = ["experiment.yaml", f"output={output}"]
    return {
        "train": ["train", *experiment],
        "offline": ["train", *experiment, "train.method=dpo", "train.samples.rounds=2"],
        "train-reward": ["train-reward", "reward.yaml", f"output={output}"],
        "refresh-reward": ["refresh-reward", "refresh.yaml", f"policy.output={output}", f"reward.output={output}-reward"],
        "compare": ["compare", *experiment],
    }.get(name, [name, *experiment, "policies=policies"])


def left_by(folder: Path):
    """What a command leaves, but for times: every tensor, every table, every result."""
    left = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors" and "checkpoints" not in name:
            left[name] = {key: tensor.tolist() for key, tensor in load_file(file).items()}
        elif file.name in ("trials.csv", "summary.csv", "points.csv"):
            table = pd.read_csv(file).drop(columns=["seconds", "trial"], errors="ignore")  # what was interrupted comes later
            left[name] = table.sort_values(list(table.columns), ignore_index=True).to_json()
        elif file.name == "result.json":
            result = json.loads(file.read_text())
            left[name] = {
                key: result.get(key) for key in ("best", "scores", "test", "figures", "best_step", "reward", "value", "kept")
            }
        elif file.name == "cost.json":
            left[name] = json.loads(file.read_text())
    return left


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_a_command_that_is_killed_again_and_again_ends_as_one_that_is_not(place, command, name):
    start = time.monotonic()
    done = command(*arguments_of(name, f"{name}-calm"), folder=place)
    seconds = time.monotonic() - start
    assert done["code"] == 0, done["error"]
    chance, kills = random.Random(name), 0
    for _ in range(20 * KILLS[name]):
        limit = chance.uniform(0.05, max(0.2, 0.6 * seconds)) if kills < KILLS[name] else None
        done = command(*arguments_of(name, f"{name}-killed"), folder=place, kill_after=limit)
        kills += done["code"] is None
        if done["code"] is not None:
            assert done["code"] == 0, done["error"]
            if kills == KILLS[name]:
                break
            for made in (f"{name}-killed", f"{name}-killed-reward"):  # it was faster: once more from the start
                shutil.rmtree(place / made, ignore_errors=True)
    assert kills == KILLS[name]
    calm, killed = left_by(place / f"{name}-calm"), left_by(place / f"{name}-killed")
    assert calm.keys() == killed.keys()
    for file in calm:
        if file.endswith("cost.json"):  # what was repeated is paid for twice, and nothing is forgotten
            assert all(killed[file][key] >= calm[file][key] for key in SPENT), file
        else:
            assert calm[file] == killed[file], file
