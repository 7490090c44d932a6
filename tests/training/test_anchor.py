"""The KL anchor is real: measured exactly, its gradient alone moves a policy, and a large beta keeps one near its base."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from emorl.config import UserError
from emorl.config.experiment import BaseConfig, DataConfig, Experiment, ObjectiveConfig, TrainConfig
from emorl.config.train import CollapseConfig, ConvergenceConfig
from emorl.runs.progress import Silent
from emorl.training.anchor import kl_to_base
from tests.training.trained import train

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL 1.16 uses names that transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
TEXTS = ["", "yes", "a longer answer", "eeee", "no", "It is so."]


def e_share(prompts, completions, **columns):
    return [text.count("e") / max(1, len(text)) for text in (completion[0]["content"] for completion in completions)]


def constant(prompts, completions, **columns):
    return [0.5] * len(completions)


def chats(count):
    return [[{"role": "user", "content": f"say {'again ' * index}"}] for index in range(count)]


def divergence_by_hand(policy, base, tokenizer, prompts, texts):
    """Text by text from the logits of two separate models, through torch's own KL."""
    values = []
    for prompt, text in zip(prompts, texts, strict=True):
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        after = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            one, other = (
                model(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
                for model in (policy, base)
            )
        values.append(torch.nn.functional.kl_div(other, one, reduction="none", log_target=True).sum(-1))
    return torch.cat(values).mean().item()


def test_the_divergence_is_zero_for_a_new_adapter_and_equals_the_two_models_own_logits(
    make_causal_model, write_adapter, tokenizer, tmp_path
):
    prompts = chats(len(TEXTS))
    new = get_peft_model(make_causal_model("llama"), LoraConfig(target_modules=["q_proj"])).eval()
    assert kl_to_base(new, tokenizer, prompts, TEXTS) == 0
    path = write_adapter(make_causal_model("llama"), tmp_path / "policy")
    policy = PeftModel.from_pretrained(make_causal_model("llama"), str(path)).eval()
    expected = divergence_by_hand(policy, make_causal_model("llama"), tokenizer, prompts, TEXTS)
    assert expected > 0.1
    assert kl_to_base(policy, tokenizer, prompts, TEXTS) == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def trained(tmp_path, tiny_base_dir):
    """Factory: trains one policy; its result and its adapter's directory."""
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(24)))

    def run(function, output, steps, beta, progress=None, **lora):
        grpo = {"max_steps": steps, "eval_steps": steps, "per_device_train_batch_size": 16, "num_generations": 8}
        experiment = Experiment(
            output=tmp_path / output,
            base=BaseConfig(model=str(tiny_base_dir)),
            data=DataConfig(path=str(data), validation=4, test=4),
            objectives={"letters": ObjectiveConfig(function=f"{__name__}:{function}")},
            generation={"max_new_tokens": 8, "do_sample": False},
            train=TrainConfig(
                lora={"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **lora},
                grpo={**grpo, "learning_rate": 2e-2, "beta": beta},
                convergence=ConvergenceConfig(threshold=0.0),
                collapse=CollapseConfig(share=0.0),
            ),
        )
        path = train(experiment, "letters", progress)
        return json.loads((path / "result.json").read_text()), path / "policy"

    return run


def logged(result, key):
    return [entry[key] for entry in result["log"] if key in entry]


def test_where_all_rewards_are_equal_only_the_anchors_gradient_moves_a_policy_and_it_moves_to_the_base(trained):
    away = {"init_lora_weights": False}  # random adapter: the policy starts away from its base
    loose, _ = trained("constant", "loose", 10, 0.0, **away)
    held, _ = trained("constant", "held", 10, 0.5, **away)
    start, end = logged(loose, "eval_kl")
    assert start == end > 0  # no gradient at all
    assert logged(loose, "grad_norm") == [0.0] * 10
    assert logged(held, "eval_kl")[0] == start
    assert min(logged(held, "grad_norm")) > 0
    assert held["kl"] == logged(held, "eval_kl")[1] < 0.7 * start


def test_a_large_beta_keeps_the_policy_near_the_base_and_the_log_holds_a_positive_kl(trained, make_causal_model, tokenizer):
    far, near = (trained("e_share", f"beta-{beta:g}", 24, beta) for beta in (0.0, 5.0))
    base, prompts = make_causal_model("llama"), chats(len(TEXTS))
    far_kl, near_kl = (
        divergence_by_hand(
            PeftModel.from_pretrained(make_causal_model("llama"), str(path)).eval(), base, tokenizer, prompts, TEXTS
        )
        for _, path in (far, near)
    )
    assert far_kl > 0.2
    assert near_kl < 0.25 * far_kl
    assert logged(far[0], "kl") == []
    assert max(logged(near[0], "kl")) > 0
    assert near[0]["kl"] < far[0]["kl"]


class Listener(Silent):
    def __init__(self):
        self.warnings = []

    def warn(self, line):
        self.warnings.append(line)


def test_no_anchor_is_said_and_a_negative_one_refused(trained):
    listener = Listener()
    trained("constant", "none", 1, 0.0, listener)
    assert listener.warnings == ["train.grpo.beta is 0: nothing holds policy letters near the base (default 0.05)"]
    with pytest.raises(UserError, match=r"train.grpo.beta: expected a number of at least 0, got -0.1"):
        trained("constant", "negative", 1, -0.1)
