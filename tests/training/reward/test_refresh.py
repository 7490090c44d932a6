"""Adversarial refresh: what is added, and one real round on tiny models."""

import dataclasses
import json

import pytest

from emorl.cli import main
from emorl.config.experiment import BaseConfig, DataConfig, Experiment, ObjectiveConfig, TrainConfig
from emorl.config.reward import RefreshExperiment, RewardDataConfig, RewardExperiment
from emorl.config.yaml import to_yaml
from emorl.reporting.reward_tables import refresh_table
from emorl.runs.results import RefreshResult, read_result
from emorl.stages.refresh_reward import refresh
from emorl.training.reward.data import load_graded
from emorl.training.reward.refresh import MISMATCHED, REPEATED, negatives

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL 1.16 uses names that transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture
def experiment(tmp_path, tiny_base_dir, save_word_encoder):
    save_word_encoder(tmp_path / "bert", ["say", "yes", "no"])
    rows = [
        {"prompt": f"say {n}", "response": word, "stars": stars} for n in range(20) for word, stars in (("yes", 5), ("no", 1))
    ]
    (tmp_path / "graded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(20)))
    reward = RewardExperiment(
        output=tmp_path / "reward",
        model=str(tmp_path / "bert"),
        data=RewardDataConfig(path=str(tmp_path / "graded.jsonl"), labels=["stars"], label_range=(1, 5), validation=0.2),
        loss="regression",
        max_tokens=64,
        training={"num_train_epochs": 1, "bf16": False},
    )
    grpo = {"max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 2, "eval_steps": 1, "beta": 0.01}
    policy = Experiment(
        output=tmp_path / "refresh",
        base=BaseConfig(model=str(tiny_base_dir)),
        data=DataConfig(path=str(tmp_path / "prompts.jsonl"), validation=6, test=2),
        objectives={"yes": ObjectiveConfig(function="classifier")},
        generation={"max_new_tokens": 4, "do_sample": False},
        train=TrainConfig(lora={"r": 2, "target_modules": ["q_proj"]}, grpo=grpo),
    )
    return RefreshExperiment(reward=reward, policy=policy, rounds=2, negatives=5, retraining={"learning_rate": 1e-5})


def test_what_is_said_to_everyone_and_what_was_said_to_others():
    said = [("a", "I see."), ("b", "i  see."), ("c", "Your knee hurts."), ("d", "You miss him.")]
    rows = negatives(said, most=10, seed=0)
    repeated = {(row["prompt"], row["response"]) for row in rows if row["kind"] == REPEATED}
    assert repeated == {("a", "I see."), ("b", "i  see.")}
    mismatched = [(row["prompt"], row["response"]) for row in rows if row["kind"] == MISMATCHED]
    assert len(mismatched) == 4
    assert not set(mismatched) & {*said, ("b", "I see."), ("a", "i  see.")}
    assert len(negatives(said, most=1, seed=0)) == 2
    assert negatives(said, 10, 0) == negatives(said, 10, 0)
    assert [row["kind"] for row in negatives([("a", "x"), ("b", "x")], 10, 0)] == [REPEATED, REPEATED]


def test_two_rounds_through_the_command_line(experiment, tmp_path, capsys):
    (tmp_path / "refresh.yaml").write_text(to_yaml(experiment))
    assert main(["refresh-reward", str(tmp_path / "refresh.yaml")]) == 0
    assert "| 2 | validation: AUC above the lowest label |" in capsys.readouterr().out
    rounds = json.loads((tmp_path / "refresh" / "result.json").read_text())["rounds"]
    assert len(rounds) == 2
    result = read_result(RefreshResult, tmp_path / "refresh")
    [(kind, score)] = list(rounds[0]["held_out_before"].items())[:1]
    assert f"{kind} outputs to validation prompts | {score:.3f} |" in refresh_table(result.rounds)
    assert rounds[0]["validation_after"] == rounds[1]["validation_before"]
    assert rounds[0]["added_before"].keys() == rounds[0]["added_after"].keys() == rounds[0]["added"].keys()
    assert rounds[0]["held_out_before"].keys() == rounds[0]["held_out_after"].keys() == rounds[0]["held_out"].keys()
    first = load_graded(experiment.reward)
    added, held_out, table = (
        [json.loads(line) for line in (tmp_path / "refresh" / "round-1" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("negatives", "held_out", "graded")
    )
    assert held_out
    assert not {row["prompt"] for row in held_out} & {row["prompt"] for row in added}
    assert len(table) == len(first.training) + len(added)
    assert {row["stars"] for row in table[len(first.training) :]} == {1.0}
    assert {row["stars"] for row in table[: len(first.training)]} == {1.0, 5.0}
    validation = (tmp_path / "refresh" / "round-1" / "validation.jsonl").read_text()
    assert validation == (tmp_path / "refresh" / "round-2" / "validation.jsonl").read_text()
    config = json.loads((tmp_path / "refresh" / "round-2" / "reward" / "run.json").read_text())["config"]
    assert config["model"] == str(tmp_path / "refresh" / "round-1" / "reward" / "model")


def test_a_killed_refresh_goes_on_with_what_is_done(experiment, tmp_path):
    refresh(experiment)
    finished = json.loads((tmp_path / "refresh" / "result.json").read_text())
    manifest = tmp_path / "refresh" / "run.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "finished": False}))
    kept = tmp_path / "refresh" / "round-2" / "reward" / "run.json"
    written = kept.stat().st_mtime_ns
    refresh(experiment)
    assert kept.stat().st_mtime_ns == written
    assert json.loads((tmp_path / "refresh" / "result.json").read_text()) == finished


def test_a_refresh_has_one_objective(experiment):
    two = {"yes": ObjectiveConfig(function="classifier"), "no": ObjectiveConfig(function="length")}
    policy = dataclasses.asdict(experiment.policy) | {"objectives": two}
    with pytest.raises(ValueError, match="expected the reward model alone"):
        RefreshExperiment(reward=experiment.reward, policy=Experiment(**policy))
