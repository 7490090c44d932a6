"""The train stage on a random tiny policy, through TRL's real GRPOTrainer."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from emorl.config import UserError
from emorl.config.experiment import BaseConfig, DataConfig, Experiment, ObjectiveConfig, TrainConfig
from emorl.config.objective import TransformConfig
from emorl.config.train import CollapseConfig, ConvergenceConfig
from emorl.config.yaml import to_yaml
from emorl.policies.adapters import read_adapter
from emorl.runs.progress import Silent
from tests.training.trained import policy_folders, train

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL 1.16 uses names that transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def e_share(prompts, completions, **columns):
    """Share of the letter e: a policy without any idea of language can learn it."""
    return [text.count("e") / max(1, len(text)) for text in (completion[0]["content"] for completion in completions)]


def variety(prompts, completions, **columns):
    """Share of distinct letters, which the base has already."""
    return [len(set(text)) / max(1, len(text)) for text in (completion[0]["content"] for completion in completions)]


def broken(prompts, completions, **columns):
    return [float("nan")] * len(completions)


class Listener(Silent):
    def __init__(self):
        self.warnings = []

    def warn(self, line):
        self.warnings.append(line)


@pytest.fixture
def experiment(tmp_path, tiny_base_dir):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {word} {i}"}) + "\n" for i in range(12) for word in ("yes", "no")))

    def make(steps=4, output="run", **grpo):
        settings = {"max_steps": steps, "per_device_train_batch_size": 16, "num_generations": 8, "eval_steps": 2}
        return Experiment(
            output=tmp_path / output,
            base=BaseConfig(model=str(tiny_base_dir)),
            data=DataConfig(path=str(data), validation=4, test=4),
            objectives={
                "letters": ObjectiveConfig(function=f"{__name__}:e_share"),
                "short": ObjectiveConfig(function="length", options={"minimum": 0, "maximum": 1}),
            },
            generation={"max_new_tokens": 8, "do_sample": False},
            train=TrainConfig(
                lora={"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
                grpo={**settings, **grpo},
                convergence=ConvergenceConfig(threshold=0.0),
                collapse=CollapseConfig(share=0.0),
            ),
        )

    return make


def adapter(path):
    return load_file(path / "policy" / "adapter_model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_it_learns_and_leaves_an_ordinary_adapter(experiment):
    path = train(experiment(steps=24, eval_steps=4, learning_rate=2e-2, beta=0.0), "letters")
    result = json.loads((path / "result.json").read_text())
    assert result["reward"] > result["base_reward"] + 0.2
    assert result["best_step"] in range(4, 25, 4)
    read = read_adapter(path / "policy")
    assert read.base_fingerprint
    cost = json.loads((path / "cost.json").read_text())
    validations = 1 + 24 // 4
    assert cost["completions"] == cost["reward_calls"] == 24 * 16 + validations * 4
    assert cost["prompts"] == 24 * 2 + validations * 4
    assert cost["tokens"] > 0


def test_the_same_seed_gives_the_same_policy_and_a_finished_run_is_skipped(experiment):
    one, other = train(experiment(output="a"), "letters"), train(experiment(output="b"), "letters")
    assert equal(adapter(one), adapter(other))
    written = (one / "policy" / "adapter_model.safetensors").stat().st_mtime_ns
    assert train(experiment(output="a"), "letters") == one
    assert (one / "policy" / "adapter_model.safetensors").stat().st_mtime_ns == written


def with_transform(experiment, function="e_share", **transform):
    letters = ObjectiveConfig(function=f"{__name__}:{function}", transform=TransformConfig(**transform))
    return dataclasses.replace(experiment, objectives={"letters": letters})


def test_training_maximises_the_log_while_validation_and_result_report_the_score(experiment):
    plain, logged = (with_transform(experiment(output=str(log)), "variety", range=(0, 2), log=log) for log in (False, True))
    results = [json.loads((train(one, "letters") / "result.json").read_text()) for one in (plain, logged)]
    assert 0 < results[0]["base_reward"] <= 0.5  # half of a share
    assert results[1]["base_reward"] == pytest.approx(results[0]["base_reward"], abs=1e-4)  # the same greedy texts
    assert results[1]["scale"].endswith("clipped to [0.0001, 0.9999]; training reward log(score)")
    first = [next(entry["reward"] for entry in result["log"] if "reward" in entry) for result in results]
    assert first[0] > 0 > first[1] > math.log(1e-4)
    assert first[1] < math.log(first[0])  # a mean of logs


def test_another_transform_is_another_run(experiment):
    train(experiment(steps=2), "letters")
    with pytest.raises(UserError, match=r"holds a run with other settings \(objectives.letters.transform: None -> "):
        train(with_transform(experiment(steps=2), range=(0, 0.5)), "letters")


def test_scores_outside_the_range_are_reported_at_the_end(experiment):
    listener = Listener()
    path = train(with_transform(experiment(steps=2), range=(0.5, 0.6)), "letters", listener)
    result = json.loads((path / "result.json").read_text())
    (line,) = listener.warnings
    assert re.match(r"objective 'letters': \d+ of 40 raw scores were outside its range \[0.5, 0.6\] and were clipped", line)
    assert result["scores_outside_range"] > 0


def test_an_objective_added_later_trains_alone(experiment):
    first = train(experiment(steps=2), "short")
    written = (first / "run.json").stat().st_mtime_ns
    with pytest.raises(UserError, match="no trained policy for letters"):
        policy_folders(experiment(steps=2))
    train(experiment(steps=2), "letters")
    assert (first / "run.json").stat().st_mtime_ns == written
    assert list(policy_folders(experiment(steps=2))) == ["letters", "short"]


def test_killed_training_resumes_from_its_checkpoint_to_the_same_policy(experiment, tmp_path):
    whole = train(experiment(steps=8, output="whole"), "letters")
    killed = experiment(steps=8, output="killed")
    code = textwrap.dedent(
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from pathlib import Path
        from emorl.config.experiment import load_kept_experiment
        from tests.training.trained import train
        import torch; torch.set_num_threads(1)
        train(load_kept_experiment(Path({str(tmp_path / "killed")!r})), "letters")
        """
    )
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "experiment.yaml").write_text(to_yaml(killed))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed" / "train" / "letters" / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1].decode()[-2000:]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    torn = checkpoint.parent.with_name("checkpoint-6")
    (torn / "trainer_state.json").unlink(missing_ok=True)
    os.makedirs(torn, exist_ok=True)
    resumed = train(killed, "letters")
    steps = [entry["step"] for entry in json.loads((resumed / "result.json").read_text())["log"] if "eval_reward" in entry]
    assert steps == [0, 2, 4, 6, 8]
    assert equal(adapter(whole), adapter(resumed))


@pytest.mark.parametrize(
    ("grpo", "message"),
    [
        ({"learning_rat": 1.0}, "unknown key 'train.grpo.learning_rat'.*did you mean 'learning_rate'"),
        ({"seed": 3}, "train.grpo.seed is set by emorl; use seed"),
        ({"num_generations": 7}, "train.grpo: .*num_generations"),
        ({"save_steps": 3}, "train.grpo.save_steps is set by emorl; use train.grpo.eval_steps"),
    ],
)
def test_a_wrong_training_setting_is_refused_before_a_model_loads(experiment, grpo, message):
    with pytest.raises(UserError, match=message) as caught:
        train(experiment(**grpo), "letters")
    assert "\n" not in str(caught.value)
    assert not (experiment().output / "train").exists()


def test_an_unknown_objective_and_a_missing_base_are_refused(experiment, tmp_path):
    with pytest.raises(UserError, match=r"no objective 'leters' .*did you mean 'letters'"):
        train(experiment(), "leters")
    lost = dataclasses.replace(experiment(), base=BaseConfig(model=str(tmp_path / "nothing")))
    with pytest.raises(UserError, match=r"base.model .*no such folder"):
        train(lost, "letters")


def test_scores_that_are_not_numbers_stop_training_by_name(experiment):
    bad = dataclasses.replace(experiment(), objectives={"bad": ObjectiveConfig(function=f"{__name__}:broken")})
    with pytest.raises(UserError, match="objective 'bad' returned nan for completion 0"):
        train(bad, "bad")
