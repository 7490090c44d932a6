"""Self-critical sequence training: hand-computed advantages, identities of its gradient, and that it learns."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig

from emorl.training.advantages import advantages_of
from emorl.training.scst import Samples, SCSTConfig, SCSTTrainer

NAN = math.nan
LORA = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=16, target_modules=["q", "v", "wo"])
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL and PEFT use names that transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def e_share(prompts, completions, **columns):
    """Share of the letter e."""
    return [text.count("e") / max(1, len(text)) for text in completions]


def constant(prompts, completions, **columns):
    return [0.7] * len(completions)


@pytest.fixture
def make_trainer(make_seq2seq_model, plain_tokenizer, tmp_path):
    prompts = Dataset.from_dict({"prompt": [f"say {word}" for word in ("yes", "no", "why", "maybe so")]})

    def make(reward=e_share, model=None, peft_config=LORA, **settings):
        defaults = {
            "output_dir": str(tmp_path), "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6,
            "learning_rate": 5e-2, "lr_scheduler_type": "constant", "max_steps": 1, "report_to": "none", "use_cpu": True,
            "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "beta": 0.0, "seed": 1,
            "dataloader_pin_memory": False,
        }  # fmt: skip
        return SCSTTrainer(
            model=make_seq2seq_model() if model is None else model,
            reward_funcs=reward if isinstance(reward, list) else [reward],
            args=SCSTConfig(**{**defaults, **settings}),
            train_dataset=prompts,
            processing_class=plain_tokenizer,
            peft_config=peft_config,
        )

    return make


def rows(trainer):
    return [trainer.train_dataset[index] for index in range(4)]


def gradients(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    found = {name: parameter.grad for name, parameter in trainer.model.named_parameters() if parameter.grad is not None}
    assert found
    return found


def test_advantages_of_two_samples_by_hand():
    rewards, weight = torch.tensor([[1.0], [0.4], [0.0], [0.0]]), torch.ones(1)
    assert advantages_of(rewards, weight, 2).tolist() == pytest.approx([0.6, -0.6, 0.0, 0.0])
    assert advantages_of(rewards, weight, 2, baseline="group_mean").tolist() == pytest.approx([0.3, -0.3, 0.0, 0.0])


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_the_group_mean_is_leaving_one_out_but_for_a_factor(samples):
    rewards, weight = torch.randn(4 * samples, 1), torch.ones(1)
    with_itself = advantages_of(rewards, weight, samples, baseline="group_mean")
    assert torch.allclose(with_itself, advantages_of(rewards, weight, samples) * (samples - 1) / samples, atol=1e-6)


def test_a_baseline_leaves_its_own_sample_out():
    rewards = torch.tensor([[1.0], [0.0], [0.5]])
    assert advantages_of(rewards, torch.ones(1), 3).tolist() == pytest.approx([1 - 0.25, 0 - 0.75, 0.5 - 0.5])


def test_what_nothing_scored_is_in_no_baseline_and_has_no_advantage():
    rewards = torch.tensor([[1.0], [0.4], [NAN]])
    assert advantages_of(rewards, torch.ones(1), 3).tolist() == pytest.approx([0.6, -0.6, 0.0])
    two = torch.tensor([[1.0, NAN], [0.4, 0.0], [NAN, NAN]])
    assert advantages_of(two, torch.tensor([1.0, 1.0]), 3).tolist() == pytest.approx([0.6, -0.6, 0.0])


def test_several_rewards_are_summed_with_their_weights_or_normalised_first():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.1], [0.5, 0.5], [0.6, 0.5]])
    summed = advantages_of(rewards, torch.tensor([0.5, 0.5]), 2)
    assert summed.tolist() == pytest.approx([0.45, -0.45, -0.05, 0.05], abs=1e-6)
    balanced = advantages_of(rewards, torch.tensor([0.5, 0.5]), 2, aggregation="normalize_then_sum")
    assert balanced[:2].abs().max() < 0.01 < balanced[3]  # GDPO: a small difference counts as much as a large one
    tilted = advantages_of(rewards, torch.tensor([0.2, 0.8]), 2, aggregation="normalize_then_sum")
    assert tilted[1] > 0 > tilted[0]
    assert tilted.mean().item() == pytest.approx(0.0, abs=1e-6)


def test_gdpo_agrees_with_trl(make_trainer):
    """TRL's formula for normalize_then_sum, written down from its documentation of GDPO."""
    rewards, weights = torch.randn(12, 3), torch.tensor([0.2, 0.5, 0.3])
    grouped = rewards.view(3, 4, 3)
    normalized = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    total = (normalized.view(12, 3) * weights).sum(1)
    expected = (total - total.mean()) / (total.std() + 1e-4)
    assert torch.allclose(advantages_of(rewards, weights, 4, aggregation="normalize_then_sum"), expected, atol=1e-5)


def test_equal_rewards_give_no_gradient(make_trainer):
    trainer = make_trainer(constant)
    samples = trainer.sample(rows(trainer))
    assert samples.advantages.abs().max() == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients(trainer, trainer.loss_of(trainer.model, samples)).values())


def test_the_loss_of_two_samples_by_hand(make_trainer):
    """Log-probabilities token by token through the whole decoder again, the end token included and nothing behind it."""
    trainer = make_trainer(num_generations=2, temperature=0.7)
    inputs = trainer.processing_class(["hello there"], return_tensors="pt")
    ids = torch.tensor([[40, 50, 1, 0], [60, 70, 80, 90]])  # one ended, one was cut off
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    repeated = {name: value.repeat(2, 1) for name, value in inputs.items()}
    loss = trainer.loss_of(trainer.model, Samples(repeated, ids, mask, torch.tensor([0.5, -0.5])))
    expected = 0.0
    for row, (advantage, length) in enumerate(((0.5, 3), (-0.5, 4))):
        tokens = [0]
        for token in ids[row, :length].tolist():
            logits = trainer.model(**inputs, decoder_input_ids=torch.tensor([tokens])).logits[0, -1] / 0.7
            expected -= advantage * logits.log_softmax(-1)[token].item() / 2
            tokens.append(token)
    assert loss.item() == pytest.approx(expected, abs=1e-4)


def test_samples_end_with_their_end_token_and_carry_their_columns(make_trainer):
    seen = {}

    def reward(prompts, completions, completion_ids, **columns):
        seen.update(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [0.0] * len(completions)

    trainer = make_trainer(reward, max_completion_length=40, temperature=3.0)
    topics = [{"prompt": "say yes", "topic": "a"}, {"prompt": "say no", "topic": "b"}]
    samples = trainer.sample(topics)
    assert seen["topic"] == ["a"] * 4 + ["b"] * 4
    assert seen["prompts"][3:5] == ["say yes", "say no"]
    for ids, mask, given in zip(samples.ids, samples.mask, seen["completion_ids"], strict=True):
        ends = (ids == 1).nonzero()
        length = int(ends[0]) + 1 if len(ends) else len(ids)
        assert mask.tolist() == [1] * length + [0] * (len(ids) - length)
        assert ids[:length].tolist() == given


def test_the_kl_acts_on_the_gradient_and_is_zero_at_the_base(make_trainer):
    trainer = make_trainer(constant, beta=1.0)
    samples = trainer.sample(rows(trainer))
    assert trainer.loss_of(trainer.model, samples).item() == pytest.approx(0.0, abs=1e-5)  # B starts at zero: the base itself
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    loss = trainer.loss_of(trainer.model, samples)
    assert loss.item() > 1e-3
    assert max(gradient.abs().max().item() for gradient in gradients(trainer, loss).values()) > 1e-4


def test_a_larger_beta_keeps_the_policy_nearer_and_it_learns(make_trainer):
    results = {}
    for beta in (0.0, 3.0):
        trainer = make_trainer(beta=beta, max_steps=30, per_device_train_batch_size=4, num_generations=8)
        trainer.train()
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        samples = trainer.sample(rows(trainer))
        trainer._settings.beta = 1.0
        trainer._metrics.clear()
        trainer.loss_of(trainer.model, samples)
        results[beta] = rewards, trainer._metrics["kl"][0]
    free, held = results[0.0], results[3.0]
    assert sum(free[0][-5:]) / 5 > sum(free[0][:5]) / 5 + 0.3
    assert held[1] < 0.5 * free[1]


def test_full_tuning_is_held_by_a_frozen_copy(make_trainer):
    trainer = make_trainer(constant, peft_config=None, beta=0.5)
    samples = trainer.sample(rows(trainer))
    assert trainer.loss_of(trainer.model, samples).item() == pytest.approx(0.0, abs=1e-5)
    with torch.no_grad():
        trainer.model.shared.weight += 0.1 * torch.randn_like(trainer.model.shared.weight)
    assert trainer.loss_of(trainer.model, samples).item() > 1e-3


def test_accumulated_batches_are_one_large_batch(make_trainer):
    """The same samples in two halves: their losses' mean is the loss of all."""
    trainer = make_trainer(beta=0.3)
    samples = trainer.sample(rows(trainer))
    halves = [
        Samples(
            {k: v[part] for k, v in samples.inputs.items()}, samples.ids[part], samples.mask[part], samples.advantages[part]
        )
        for part in (slice(0, 8), slice(8, 16))
    ]
    whole = trainer.loss_of(trainer.model, samples)
    assert whole.item() == pytest.approx(sum(trainer.loss_of(trainer.model, half).item() for half in halves) / 2, abs=1e-5)


def test_bart_is_sampled_without_its_forced_tokens(make_trainer, plain_tokenizer):
    """BART's own generation config forces the end token at full length: no choice of the policy."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}  # fmt: skip
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "decoder_start_token_id": 1}
    model = BartForConditionalGeneration(BartConfig(vocab_size=261, max_position_embeddings=64, **sizes, **special))
    model.generation_config = GenerationConfig(forced_eos_token_id=1, repetition_penalty=9.0, **special)
    lora = LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q_proj", "v_proj"])
    trainer = make_trainer(model=model, peft_config=lora, max_completion_length=5)
    samples = trainer.sample(rows(trainer))
    assert (samples.ids[:, -1] == 1).float().mean() < 0.5
    assert model.generation_config.repetition_penalty == 9.0
    assert trainer.train().training_loss is not None


def test_mistakes_are_named(make_trainer, make_causal_model):
    for settings, message in (
        ({"baseline": "mean"}, "baseline: expected leave_one_out or group_mean, got 'mean'"),
        ({"num_generations": 1}, "num_generations: a sample needs another one"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights: expected 1, one for each reward, got 2"),
        ({"gradient_checkpointing": True}, "needs disable_dropout=False"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(**settings)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no encoder; train a decoder with TRL's GRPOTrainer"):
        make_trainer(model=make_causal_model())
