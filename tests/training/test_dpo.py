"""Offline training: policies by TRL's DPO on pairs of shared samples or of people, through the real train stage."""

import dataclasses
import json
import math
from copy import deepcopy

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import emorl.training.samples
from emorl.config import UserError
from emorl.config.experiment import BaseConfig, DataConfig, Experiment, ObjectiveConfig, TrainConfig
from emorl.config.train import CollapseConfig, ConvergenceConfig, SamplesConfig
from emorl.policies.adapters import read_adapter
from emorl.policies.prompts import encode
from emorl.runs.layout import Layout
from emorl.runs.run import open_run, read_cost
from emorl.stages.materials import Materials
from emorl.training.dpo import PairSplits
from emorl.training.lora import lora_config
from emorl.training.trainers import build_trainer, trainer_config
from tests.training.trained import plan, train

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL 1.16 uses names that transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def texts_of(completions):
    return [text if isinstance(text, str) else text[0]["content"] for text in completions]


def letters(prompts, completions, **columns):
    """Share of letters among the characters: a policy without any idea of language can learn it."""
    return [sum(map(str.isalpha, text)) / max(1, len(text)) for text in texts_of(completions)]


def digits(prompts, completions, **columns):
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in texts_of(completions)]


def constant(prompts, completions, **columns):
    return [0.5] * len(completions)


@pytest.fixture
def experiment(tmp_path, tiny_base_dir):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {word} {i}"}) + "\n" for i in range(12) for word in ("yes", "no")))

    def make(steps=4, output="run", objectives=("letters",), samples=None, mode="ensemble", **dpo):
        settings = {"max_steps": steps, "per_device_train_batch_size": 8, "eval_steps": 2, "learning_rate": 1e-2}
        named = {name: ObjectiveConfig(function=f"tests.training.test_dpo:{name}") for name in objectives}
        return Experiment(
            output=tmp_path / output,
            base=BaseConfig(model=str(tiny_base_dir)),
            data=DataConfig(path=str(data), validation=4, test=4),
            objectives=named if isinstance(objectives, tuple) else objectives,
            generation={"max_new_tokens": 8, "do_sample": False},
            train=TrainConfig(
                mode=mode,
                method="dpo",
                lora={"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
                dpo={**settings, **dpo},
                samples=samples or SamplesConfig(per_prompt=6, choose="all"),
                convergence=ConvergenceConfig(threshold=0.0),
                collapse=CollapseConfig(share=0.0),
            ),
        )

    return make


def result_of(path):
    return json.loads((path / "result.json").read_text())


def adapter(path):
    return load_file(path / "policy" / "adapter_model.safetensors")


def test_it_learns_and_leaves_an_ordinary_adapter(experiment):
    path = train(experiment(steps=40, eval_steps=10), "letters")
    result = result_of(path)
    assert result["reward"] > result["base_reward"] + 0.2
    in_order = [entry["rewards/accuracies"] for entry in result["log"] if "rewards/accuracies" in entry]
    assert sum(in_order[-10:]) / 10 > 0.9
    assert result["method"] == "dpo"
    assert result["log"][0]["eval_pair_accuracy"] == 0.5  # the base, which is the reference
    assert read_adapter(path / "policy").base_fingerprint


@torch.no_grad()
def log_probability(model, prompt, answer):
    """Of an answer's tokens behind its prompt, one by one."""
    log_p = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    return sum(float(log_p[len(prompt) - 1 + at, token]) for at, token in enumerate(answer))


def test_accuracy_on_held_out_pairs_is_what_whole_forwards_give(experiment, tiny_base_dir, tokenizer):
    asked = experiment(steps=6)
    path = train(asked, "letters")
    result, pairs = result_of(path), pd.read_parquet(path / "pairs.parquet")
    base = AutoModelForCausalLM.from_pretrained(tiny_base_dir)
    prompts = Materials(asked).splits.train["prompt"]
    held_out = pairs[pairs["held_out"]]
    asked_ids = [encode(tokenizer, [prompts[index]])["input_ids"][0].tolist() for index in held_out["prompt_index"]]
    sides = [held_out[f"{side}_ids"].tolist() for side in ("chosen", "rejected")]

    def margins(model):
        scores = [[log_probability(model, p, ids) for p, ids in zip(asked_ids, side, strict=True)] for side in sides]
        return torch.tensor(scores[0]) - torch.tensor(scores[1])

    of_base = margins(base)
    gained = margins(PeftModel.from_pretrained(base, path / "policy").eval()) - of_base
    best = next(e for e in reversed(result["log"]) if e["step"] == result["best_step"] and "eval_pair_margin" in e)
    assert best["eval_pair_margin"] == pytest.approx(float(gained.mean()), abs=1e-4)
    assert result["pair_accuracy"] == pytest.approx(float((gained > 0).float().mean()))


def trainer_of(experiment, rows, tmp_path):
    """DPO's trainer on pairs given as tokens."""
    asked, materials = plan(experiment, "letters"), Materials(experiment)
    config = trainer_config(asked, experiment.train, experiment.base, experiment.generation, 0, tmp_path / "checkpoints")
    pairs = Dataset.from_list(rows)
    return build_trainer(
        asked, experiment.train, config, lora_config(experiment.train, experiment.base), base=materials.own_base(),
        splits=materials.splits, objectives=[], generation=experiment.generation, pairs=PairSplits(pairs, pairs),
        run=open_run(tmp_path / "scratch", "train", {}),
    )  # fmt: skip


def first_step(experiment, rows, tmp_path):
    """Loss and gradients of one batch of pairs, the adapter as it is when training begins."""
    trainer = trainer_of(experiment, rows, tmp_path)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return float(loss.detach()), [p.grad.abs().max().item() for p in trainer.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_a_pair_of_equal_answers_gives_no_gradient_and_another_one_does(experiment, tmp_path, loss_type):
    equal = {"prompt_ids": [3, 9, 12, 4], "chosen_ids": [70, 71, 1], "rejected_ids": [70, 71, 1]}
    other = {**equal, "rejected_ids": [90, 91, 92, 1]}
    asked = experiment(loss_type=loss_type)
    loss, gradients = first_step(asked, [equal] * 8, tmp_path)
    assert max(gradients) < 1e-5  # of roundings alone: both answers stand in other rows of the batch
    if loss_type == "sigmoid":
        assert loss == pytest.approx(math.log(2), abs=1e-6)  # the policy is its own reference
    assert max(first_step(asked, [other] * 8, tmp_path)[1]) > 1e-4


def test_no_more_pairs_are_read_than_training_comes_to(experiment, tmp_path):
    row = {"prompt_ids": [3, 9, 4], "chosen_ids": [70, 1], "rejected_ids": [90, 1]}
    assert len(trainer_of(experiment(steps=2), [row] * 50, tmp_path).pairs.train) == 2 * 8


def test_the_same_seed_gives_the_same_policy_and_a_finished_run_is_skipped(experiment):
    one, other = train(experiment(output="a"), "letters"), train(experiment(output="b"), "letters")
    assert adapter(one).keys() == adapter(other).keys()
    assert all(adapter(one)[name].equal(adapter(other)[name]) for name in adapter(one))
    written = (one / "policy" / "adapter_model.safetensors").stat().st_mtime_ns
    assert train(experiment(output="a"), "letters") == one
    assert (one / "policy" / "adapter_model.safetensors").stat().st_mtime_ns == written


def test_policies_share_one_set_of_samples_and_one_added_later_samples_nothing(experiment):
    first = experiment(objectives=("letters",))
    train(first, "letters")
    samples = Layout(first.output).samples
    written, sampled = (samples / "samples.parquet").stat().st_mtime_ns, read_cost(samples)
    assert (sampled.prompts, sampled.completions, sampled.reward_calls) == (16, 16 * 6, 0)
    both = experiment(objectives=("letters", "digits"))
    path = train(both, "digits")
    assert (samples / "samples.parquet").stat().st_mtime_ns == written
    assert read_cost(samples) == sampled
    validations = 1 + 4 // 2
    assert read_cost(path).completions == validations * 4  # nothing but validation was decoded
    assert read_cost(path).reward_calls == 16 * 6 + validations * 4


def test_pairs_are_the_sampled_tokens_and_prompts_held_out_are_not_trained_on(experiment, tiny_base_dir):
    path = train(experiment(), "letters")
    pairs = pd.read_parquet(path / "pairs.parquet")
    assert (pairs["chosen_value"] > pairs["rejected_value"]).all()
    assert not set(pairs.loc[pairs["held_out"], "prompt_index"]) & set(pairs.loc[~pairs["held_out"], "prompt_index"])
    for ids, text in zip(pairs["chosen_ids"], pairs["chosen"], strict=True):
        cut = len(ids) == 8 and 1 not in ids  # an answer that came to its greatest length has no end token
        assert cut or list(ids).index(1) == len(ids) - 1, text


def test_a_killed_sampling_goes_on_to_the_same_answers(experiment, monkeypatch):
    module = emorl.training.samples
    whole, killed = experiment(output="whole", samples=SamplesConfig(per_prompt=4, batch=8)), None
    train(whole, "letters")
    killed = experiment(output="killed", samples=SamplesConfig(per_prompt=4, batch=8))
    real, calls = module.generated_ids, []

    def dies(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "generated_ids", dies)
    with pytest.raises(KeyboardInterrupt):
        train(killed, "letters")
    monkeypatch.setattr(module, "generated_ids", real)
    train(killed, "letters")
    one, other = (pd.read_parquet(Layout(e.output).samples / "samples.parquet") for e in (whole, killed))
    pd.testing.assert_frame_equal(one, other)
    assert read_cost(Layout(killed.output).samples).completions == 16 * 4


def test_equal_scores_make_no_pairs_and_that_is_one_line(experiment):
    with pytest.raises(UserError, match=r"policy constant: 0 pairs to train on and 0 held out are too few; lower"):
        train(experiment(objectives=("constant",)), "constant")
    other = SamplesConfig(per_prompt=6, choose="all", validation=0.3)  # on the same samples
    with pytest.raises(UserError, match="are too few"):
        train(experiment(objectives=("constant",), samples=other), "constant")
    assert read_cost(experiment().output / "train" / "constant").reward_calls == 16 * 6  # scored once


def test_one_policy_learns_from_the_mean_of_all_scores(experiment):
    path = train(experiment(steps=2, objectives=("letters", "digits"), mode="uniform"), "uniform")
    pairs, result = pd.read_parquet(path / "pairs.parquet"), result_of(path)
    assert result["reward"] == pytest.approx(sum(result["scores"].values()) / 2)
    either = [(letters([], [text])[0] + digits([], [text])[0]) / 2 for text in (*pairs["chosen"], *pairs["rejected"])]
    chosen, rejected = either[: len(pairs)], either[len(pairs) :]
    differences = pairs["chosen_value"] - pairs["rejected_value"]
    assert (pd.Series(chosen) - pd.Series(rejected)).to_list() == pytest.approx(differences.to_list())


def test_a_second_round_begins_with_the_first_policy_and_its_own_answers(experiment):
    samples = SamplesConfig(per_prompt=6, choose="all", rounds=2)
    path = train(experiment(samples=samples, steps=8, eval_steps=4), "letters")
    first = path / "rounds" / "1"
    assert (first / "policy").is_dir()
    own = pd.read_parquet(path / "samples.parquet")
    shared = pd.read_parquet(path.parents[1] / "samples" / "samples.parquet")
    assert len(own) == len(shared)
    assert own["completion"].tolist() != shared["completion"].tolist()
    assert not all(adapter(path)[name].equal(adapter(first)[name]) for name in adapter(path))
    start = result_of(path)["log"][0]
    assert start["eval_pair_margin"] != 0  # it begins as the first round's policy, not as the base
    assert start["eval_kl"] > 0.01
    assert read_cost(path).completions > 16 * 6


def test_checkpoints_are_kept_at_the_shares_asked_for(experiment, tmp_path):
    asked = experiment(steps=4)
    kept = dataclasses.replace(asked, train=dataclasses.replace(asked.train, keep=[0.25, 0.5, 1]))
    path = train(kept, "letters")
    folders = sorted(folder.name for folder in (path / "kept").iterdir())
    assert folders == ["100%", "25%", "50%"]
    assert {read_adapter(path / "kept" / name).base_fingerprint for name in folders} == {
        read_adapter(path / "policy").base_fingerprint
    }
    tensors = [load_file(path / "kept" / name / "adapter_model.safetensors") for name in ("25%", "100%")]
    assert any(not tensors[0][name].equal(tensors[1][name]) for name in tensors[0])


def test_an_encoder_decoder_is_refused_in_one_line(experiment, tiny_seq2seq_dir):
    asked = dataclasses.replace(experiment(), base=BaseConfig(model=str(tiny_seq2seq_dir)))
    plain = dataclasses.replace(asked, train=TrainConfig(method="dpo", lora={"target_modules": ["q"]}))
    with pytest.raises(UserError, match=r"method dpo cannot train it: base.model .* is an encoder-decoder; use scst"):
        train(plain, "letters")
    with pytest.raises(UserError, match=r"train.dpo has settings, but base.model .* is an encoder-decoder; use train.scst"):
        train(asked, "letters")


def test_arguments_of_the_chat_template_reach_dpo(experiment, tmp_path, tokenizer):
    asked = experiment()
    base = tmp_path / "moody"
    AutoModelForCausalLM.from_pretrained(asked.base.model).save_pretrained(base)
    moody = deepcopy(tokenizer)
    moody.chat_template = "{{ mood }}:" + moody.chat_template
    moody.save_pretrained(base)
    data = dataclasses.replace(asked.data, chat_template_kwargs={"mood": "calm"})
    asked = dataclasses.replace(asked, base=BaseConfig(model=str(base)), data=data)
    turns = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    trainer = trainer_of(asked, [{"prompt": [{"role": "user", "content": "hi"}], **turns}] * 8, tmp_path)
    row = trainer.train_dataset[0]
    assert moody.decode(row["prompt_ids"]) == "calm:<|user|>hi<|end|><|assistant|>"
    assert moody.decode(row["chosen_ids"]) == "chosen<|end|>"


def test_an_objective_may_have_a_method_of_its_own(experiment):
    own = ObjectiveConfig(function="length", method="grpo")
    asked = experiment(objectives={"letters": ObjectiveConfig(function=f"{__name__}:letters"), "short": own})
    assert [asked.method_of(name) for name in asked.policy_names] == ["dpo", "grpo"]
    with pytest.raises(ValueError, match=r"objectives.short.method: train.mode=uniform trains one policy"):
        experiment(objectives={"short": own}, mode="uniform")
    with pytest.raises(ValueError, match=r"objectives.liked: train.mode=uniform needs scores"):
        experiment(objectives={"liked": ObjectiveConfig(pairs="pairs.jsonl")}, mode="uniform")
