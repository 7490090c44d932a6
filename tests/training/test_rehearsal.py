from pathlib import Path

import pytest
import torch

from emorl.config import UserError
from emorl.config.experiment import BaseConfig, TrainConfig
from emorl.training.modes import plan_of
from emorl.training.rehearsal import rehearse
from emorl.training.trainers import trainer_config

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL 1.16 uses names that transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture
def folders(tiny_base_dir, tiny_seq2seq_dir):
    """The base that a block suits."""
    return {"grpo": str(tiny_base_dir), "dpo": str(tiny_base_dir), "scst": str(tiny_seq2seq_dir)}


def rehearsed(model, block, settings, output="nowhere"):
    train = TrainConfig(**{block: settings})
    config = trainer_config(plan_of(train, ["a"], "a", block), train, BaseConfig(model=model), {}, 0, Path(output))
    rehearse(config, f"train.{block}")
    return config


@pytest.mark.parametrize("block", ["grpo", "scst", "dpo"])
def test_a_rehearsal_leaves_nothing_behind(folders, block, tmp_path):
    before = torch.random.get_rng_state()
    config = rehearsed(folders[block], block, {"max_steps": 7, "logging_steps": 3}, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (config.max_steps, config.logging_steps, config.output_dir) == (7, 3, str(tmp_path / "out"))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("block", "settings", "message"),
    [
        ("grpo", {"loss_type": "foo"}, "train.grpo: Unknown loss type: foo"),
        ("grpo", {"learning_rate": -1.0}, "train.grpo: Invalid learning rate: -1.0"),
        ("grpo", {"use_vllm": True}, "train.grpo: vLLM is not available"),
        ("grpo", {"deepspeed": "/nope.json"}, "train.grpo: .*deepspeed"),
        ("grpo", {"report_to": "wandb"}, "train.grpo.report_to: .*wandb"),
        ("grpo", {"report_to": "foo"}, "train.grpo.report_to: foo is not supported"),
        ("grpo", {"temperature": -1.0}, "train.grpo: `temperature`"),
        ("grpo", {"importance_sampling_level": "x"}, "train.grpo: Unknown importance sampling level"),
        ("grpo", {"num_iterations": 0}, "train.grpo: with these settings no step is ever taken"),
        ("grpo", {"dataloader_num_workers": -1}, "train.grpo: num_workers"),
        ("grpo", {"adam_beta1": 2.0}, "train.grpo: Invalid beta parameter"),
        ("grpo", {"generation_kwargs": {"foo": 1}}, "train.grpo.generation_kwargs: unknown setting 'foo'"),
        ("grpo", {"model_init_kwargs": {"dtype": "x"}}, "train.grpo.model_init_kwargs is set by emorl; use base"),
        ("dpo", {"loss_type": "foo"}, "train.dpo: Unknown loss type: foo"),
        ("dpo", {"loss_type": "exo_pair"}, "train.dpo: Label smoothing must be greater than 0.0"),
        ("dpo", {"loss_weights": [1, 2]}, "train.dpo: `loss_weights` must have the same length"),
        ("dpo", {"sync_ref_model": True}, "train.dpo: .*sync_ref_model"),
        ("dpo", {"max_completion_length": 3}, "unknown key 'train.dpo.max_completion_length'"),
        ("dpo", {"beta": -1}, "train.dpo.beta: expected a number of at least 0"),
        ("scst", {"adam_epsilon": -1.0}, "train.scst: Invalid epsilon value"),
        ("scst", {"per_device_train_batch_size": 0}, "train.scst: batch_size should be a positive integer"),
    ],
)
def test_what_the_trainer_would_refuse_later_is_one_line(folders, block, settings, message):
    with pytest.raises(UserError, match=message):
        rehearsed(folders[block], block, settings)
