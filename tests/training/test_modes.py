"""What each mode trains, and that a single policy trains through the same stage, by GRPO and by SCST."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.config import UserError
from emorl.config.experiment import BaseConfig, DataConfig, Experiment, ObjectiveConfig, TrainConfig
from emorl.config.train import CollapseConfig
from emorl.evaluation.scoring import generate
from emorl.policies.adapters import read_adapter
from emorl.policies.base import load_base
from emorl.training.trainers import prompts_per_step, trainer_config
from tests.training.trained import plan, policy_folders, train

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL and PEFT use names that transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def text_of(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]


def e_share(prompts, completions, **columns):
    return [text.count("e") / max(1, len(text)) for text in map(text_of, completions)]


def a_share(prompts, completions, **columns):
    return [text.count("a") / max(1, len(text)) for text in map(text_of, completions)]


@pytest.fixture
def make(tmp_path, tiny_base_dir, tiny_seq2seq_dir):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {word} {i}"}) + "\n" for i in range(12) for word in ("yes", "no")))

    def experiment(mode="ensemble", seq2seq=False, output="run", steps=4, settings=None, **train_settings):
        sizes = {"max_steps": steps, "eval_steps": 2, "beta": 0.0, "learning_rate": 3e-2}
        grpo = {**sizes, "per_device_train_batch_size": 16, "num_generations": 8}
        scst = {**sizes, "per_device_train_batch_size": 2, "num_generations": 8}
        return Experiment(
            output=tmp_path / output,
            base=BaseConfig(model=str(tiny_seq2seq_dir if seq2seq else tiny_base_dir)),
            data=DataConfig(path=str(data), validation=4, test=4),
            objectives={name: ObjectiveConfig(function=f"{__name__}:{name}_share") for name in ("e", "a")},
            generation={"max_new_tokens": 8, "do_sample": False},
            train=TrainConfig(
                mode=mode,
                lora={"r": 4, "lora_alpha": 16, "target_modules": ["q", "v", "wo"] if seq2seq else "all-linear"},
                **{"scst": {**scst, **(settings or {})}} if seq2seq else {"grpo": {**grpo, **(settings or {})}},
                collapse=CollapseConfig(share=0.0),
                **train_settings,
            ),
        )

    return experiment


def test_plans_of_all_modes(make):
    assert make().policy_names == ["e", "a"]
    alone = plan(make(), "a")
    assert (list(alone.objectives), alone.reward_weights) == (["a"], (1.0,))
    uniform = plan(make("uniform"), "uniform")
    assert (list(uniform.objectives), uniform.reward_weights, uniform.adaptive) == (["e", "a"], (0.5, 0.5), False)
    weighted = plan(make("weighted", preferences={"a": 3, "e": 1}), "weighted")
    assert weighted.reward_weights == (0.25, 0.75)
    assert plan(make("gdpo"), "gdpo").aggregation == "normalize_then_sum"
    assert plan(make("dynaopt"), "dynaopt").adaptive
    with pytest.raises(UserError, match="no policy 'e' in this experiment"):
        train(make("uniform"), "e")


def test_settings_reach_trl_and_scst_alike(make):
    for seq2seq in (False, True):
        experiment = make("gdpo", seq2seq)
        config = trainer_config(
            plan(experiment, "gdpo"),
            experiment.train,
            experiment.base,
            experiment.generation,
            seed=0,
            output=Path("checkpoints"),
        )
        assert config.multi_objective_aggregation == "normalize_then_sum"
        assert config.reward_weights == [0.5, 0.5]
        assert prompts_per_step(config) == 2
        assert config.max_completion_length == 8


@pytest.mark.parametrize("seq2seq", [False, True])
def test_one_policy_learns_both_objectives_and_leaves_an_ordinary_adapter(make, seq2seq):
    experiment = make("uniform", seq2seq, steps=24, settings={"eval_steps": 8})
    path = train(experiment, "uniform")
    result = json.loads((path / "result.json").read_text())
    assert result["reward"] > result["base_reward"] + 0.1
    assert result["reward"] == pytest.approx(sum(result["scores"].values()) / 2)
    cost = json.loads((path / "cost.json").read_text())
    assert cost["completions"] == 24 * 16 + 4 * 4
    assert cost["prompts"] == 24 * 2 + 4 * 4
    assert cost["reward_calls"] == 2 * (24 * 16 + 4 * 4)
    assert list(policy_folders(experiment)) == ["uniform"]
    assert read_adapter(path / "policy").base_fingerprint
    assert train(experiment, "uniform") == path


def test_policies_of_an_encoder_decoder_make_an_ensemble(make):
    experiment = make(seq2seq=True, steps=12)
    for name in experiment.policy_names:
        train(experiment, name)
    base, directories = load_base(experiment.base), policy_folders(experiment)
    ensemble = HiddenStateEnsemble(base.model, {name: read_adapter(path) for name, path in directories.items()})
    alone = PeftModel.from_pretrained(load_base(experiment.base).model, str(directories["a"])).eval()
    prompts = ["say yes", "say something longer"]
    one_hot = {"per_prompt": {"weights": torch.tensor([[0.0, 1.0]] * 2)}}
    mixed = generate(ensemble, base.tokenizer, prompts, experiment.generation, **one_hot)
    assert mixed["completion"].str.contains("a").all()  # the completion alone: its prompt is the encoder's
    assert mixed.equals(generate(alone, base.tokenizer, prompts, experiment.generation))


def test_an_encoder_decoders_training_resumes_from_its_last_checkpoint(make):
    whole, parts = make("dynaopt", True, "whole", 6), make("dynaopt", True, "parts", 6)
    expected = train(whole, "dynaopt")
    train(make("dynaopt", True, "parts", 4), "dynaopt")
    path = parts.output / "train" / "dynaopt"
    manifest = json.loads((path / "run.json").read_text())
    manifest["finished"] = False
    manifest["config"]["train"]["scst"]["max_steps"] = 6
    (path / "run.json").write_text(json.dumps(manifest))
    train(parts, "dynaopt")
    one, other = (load_file(where / "policy" / "adapter_model.safetensors") for where in (expected, path))
    assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("seq2seq", [False, True])
def test_full_tuning_saves_a_whole_model_and_measures_its_kl(make, seq2seq):
    path = train(make("uniform", seq2seq, tuning="full", settings={"beta": 0.1, "learning_rate": 1e-3}), "uniform")
    result = json.loads((path / "result.json").read_text())
    kls = [entry["eval_kl"] for entry in result["log"] if "eval_kl" in entry]
    assert kls[0] == pytest.approx(0, abs=1e-5)
    assert kls[-1] > 0
    tuned = load_base(BaseConfig(model=str(path / "policy")))
    assert tuned.model.config.is_encoder_decoder == seq2seq
    if seq2seq:
        untouched = AutoModelForSeq2SeqLM.from_pretrained(make(seq2seq=True).base.model)
        assert not torch.equal(tuned.model.shared.weight, untouched.shared.weight)


def test_contradictions_are_refused(make):
    with pytest.raises(ValueError, match="an ensemble is made of LoRA adapters"):
        make(tuning="full")
    with pytest.raises(ValueError, match="mode weighted and preferences go together"):
        make("weighted")
    with pytest.raises(ValueError, match=r"train.preferences names \['x'\]"):
        make("weighted", preferences={"x": 1})
    for seq2seq, other in ((True, "grpo"), (False, "scst")):
        wrong = dataclasses.replace(make("uniform", seq2seq), train=TrainConfig(mode="uniform", **{other: {"max_steps": 2}}))
        with pytest.raises(UserError, match=rf"train.{other} has settings, but base.model .*; use train."):
            train(wrong, "uniform")
    bfloat16 = make("uniform", tuning="full")
    with pytest.raises(UserError, match="full needs base"):
        train(dataclasses.replace(bfloat16, base=dataclasses.replace(bfloat16.base, dtype="bfloat16")), "uniform")
    broken = dataclasses.replace(make("uniform", True), train=TrainConfig(mode="uniform", scst={"steps": 3}))
    with pytest.raises(UserError, match=r"unknown key 'train.scst.steps' \(it goes to SCSTConfig\)"):
        train(broken, "uniform")
