"""What a later stage could not combine is refused before training, and so is what PEFT would refuse."""

import json

import pytest
import torch
from peft import get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from emorl.config import UserError
from emorl.config.experiment import BaseConfig, DataConfig, Experiment, ObjectiveConfig, TrainConfig
from emorl.policies.adapters import check_adapter_fits, read_adapter
from emorl.runs.progress import Silent
from emorl.training.lora import leaves_out_experts, lora_config
from tests.training.trained import train


class Listener(Silent):
    def __init__(self):
        self.said = []

    def say(self, line):
        self.said.append(line)


DEFAULT = TrainConfig().lora
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "pad_token_id": 0}
EXPERTS |= {"first_k_dense_replace": 1}
MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe", "granitemoe", "deepseek_v3", "phimoe"]


@pytest.fixture
def base(tiny_base_dir):
    return BaseConfig(model=str(tiny_base_dir))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "train.lora sets use_dora=True; only plain LoRA can be combined: train without use_dora"),
        ({"bias": "all"}, r"train.lora sets bias='all'.*train with bias='none'"),
        ({"bias": "lora_only"}, "train.lora sets bias='lora_only'"),
        ({"lora_bias": True}, "train.lora sets lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "train.lora sets init_lora_weights='pissa', which changes the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4', which changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda'|CorDA|corda_config"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'|loftq_config"),
        ({"modules_to_save": ["lm_head"]}, r"train.lora sets modules_to_save=\['lm_head'\].*share every module"),
        ({"target_parameters": ["q_proj.weight"]}, "train.lora sets target_parameters"),
        ({"trainable_token_indices": [1]}, "train.lora sets trainable_token_indices"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "train.lora sets layer_replication"),
        ({"target_modules": ["q_proj", "lm_head"]}, "train.lora adapts 'lm_head', an embedding or output head"),
        ({"target_modules": ["embed_tokens"]}, "train.lora adapts 'model.embed_tokens', an embedding or output head"),
        ({"target_modules": ["query"]}, "train.lora: PEFT refuses it: Target modules .*query.* not found"),
        ({"target_modules": "(("}, "train.lora: PEFT refuses it"),
        ({"target_modules": [3]}, r"train.lora.target_modules: expected .*got \[3\]"),
        ({"target_modules": ["norm"]}, "train.lora: PEFT refuses it: Target module .*RMSNorm.* is not supported"),
        ({"r": "x"}, "train.lora.r: expected a whole number"),
        ({"r": 0}, "train.lora: "),
        ({"r": -4}, "train.lora: "),
        ({"lora_alpha": "much"}, "train.lora.lora_alpha: expected a whole number"),
        ({"lora_dropout": "none"}, "train.lora.lora_dropout: expected a number"),
        ({"lora_dropout": 2.0}, "train.lora: PEFT refuses it"),
        ({"rank_pattern": {"q_proj(": 4}}, "train.lora: PEFT refuses it"),
        ({"layers_to_transform": [9]}, "train.lora: `layers_to_transform` cannot be used"),
        ({"rang": 4}, "unknown key 'train.lora.rang'"),
    ],
)
@pytest.mark.filterwarnings("ignore:`init_lora_weights` is")  # PEFT on corda without its config
def test_what_cannot_be_combined_or_trained_is_one_line(base, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        lora_config(TrainConfig(lora=DEFAULT | settings), base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "lora_dropout": 0.1},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}},
        {"target_modules": r".*\.(up|down)_proj", "layers_to_transform": None},
        {"layers_to_transform": [1], "target_modules": ["q_proj"]},
        {"exclude_modules": ["o_proj"]},
    ],
)
def test_what_is_let_through_trains_an_adapter_that_is_read(base, settings, tmp_path, make_causal_model):
    model = make_causal_model()
    get_peft_model(model, lora_config(TrainConfig(lora=DEFAULT | settings), base)).save_pretrained(tmp_path)
    check_adapter_fits(read_adapter(tmp_path), make_causal_model())


def test_a_model_of_the_callers_own_kind_is_tried_too_and_stays_as_it_is(make_causal_model):
    class Mine(type(make_causal_model())):
        """No auto class knows it."""

    config = make_causal_model().config
    model = Mine(config)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert lora_config(TrainConfig(), BaseConfig(model=model)).r == 16
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_trying_the_settings_draws_no_random_numbers(base):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    lora_config(TrainConfig(), base)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("family", MIXTURES)
def test_of_a_mixture_of_experts_everything_is_everything_but_the_experts(family, tmp_path):
    names = CONFIG_MAPPING[family]().to_dict()
    config = CONFIG_MAPPING[family](**{key: value for key, value in (SIZES | EXPERTS).items() if key in names})
    config.save_pretrained(tmp_path / "base")
    base = BaseConfig(model=str(tmp_path / "base"))
    assert leaves_out_experts(TrainConfig(), base)
    lora = lora_config(TrainConfig(), base)
    with torch.device("meta"):
        adapted = get_peft_model(AutoModelForCausalLM.from_config(config), lora, low_cpu_mem_usage=True)
    modules = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert modules
    assert not adapted.peft_config["default"].target_parameters
    assert all("attn" in name or "attention" in name for name in modules)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL 1.16 uses names that transformers 5.23 has renamed
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_policy_of_a_mixture_is_trained_and_what_is_left_out_is_said(tmp_path, tokenizer):
    config = CONFIG_MAPPING["mixtral"](**SIZES | {"vocab_size": len(tokenizer)}, num_local_experts=4, intermediate_size=48)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(12)))
    experiment = Experiment(
        output=tmp_path / "run",
        base=BaseConfig(model=str(tmp_path / "base")),
        data=DataConfig(path=str(tmp_path / "prompts.jsonl"), validation=4, test=4),
        objectives={"varied": ObjectiveConfig(function="distinct_2")},
        generation={"max_new_tokens": 4, "do_sample": False},
        train=TrainConfig(grpo={"max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 4}),
    )
    progress = Listener()
    policy = read_adapter(train(experiment, "varied", progress) / "policy")
    assert set(policy.factors) == {f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"}
    assert sum("all linear layers but those in the base's blocks of experts" in line for line in progress.said) == 1


def test_experts_that_are_named_are_refused(tmp_path):
    CONFIG_MAPPING["mixtral"](**SIZES, num_local_experts=4).save_pretrained(tmp_path)
    base = BaseConfig(model=str(tmp_path))
    assert not leaves_out_experts(TrainConfig(lora={"target_modules": ["q_proj"]}), base)
    with pytest.raises(UserError, match=r"train.lora adapts 'model.layers.0.mlp.gate'"):
        lora_config(TrainConfig(lora={"target_modules": ["q_proj", "gate"]}), base)


def test_full_tuning_needs_float32_and_whole_numbers(base, tiny_base_dir):
    train = TrainConfig(mode="uniform", tuning="full")
    assert lora_config(train, base) is None
    for settings in ({"dtype": "bfloat16"}, {"quantization": {"bits": 4}}):
        with pytest.raises(UserError, match=r"train.tuning: full needs base.dtype: float32"):
            lora_config(train, BaseConfig(model=str(tiny_base_dir), **settings))
