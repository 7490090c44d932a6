"""Adapters are read exactly, and everything that cannot be combined is refused with a message that says what to do."""

import json
import logging
import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from emorl.config import UserError
from emorl.policies.adapters import base_fingerprint, check_adapter_fits, read_adapter


@pytest.fixture(scope="module")
def base(make_causal_model):
    return make_causal_model("llama")


@pytest.fixture
def adapter_dir(base, write_adapter, tmp_path) -> Path:
    return write_adapter(base, tmp_path / "adapter")


def set_config(directory: Path, **settings) -> Path:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return directory


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 4, "alpha": 8},
        {"rank": 9, "alpha": 3, "rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"q_proj": 5, "v_proj": 1}},
        {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.0.self_attn.v_proj": 6}, "rslora": True},
        {"layers_to_transform": [1]},
        {"init_lora_weights": "gaussian"},
    ],
)
def test_factors_multiply_to_the_delta_that_peft_merges(base, write_adapter, tmp_path, settings):
    adapter = read_adapter(write_adapter(base, tmp_path, **settings))
    merged = PeftModel.from_pretrained(deepcopy(base), str(tmp_path)).merge_and_unload()
    deltas = {
        name.removesuffix(".weight"): after - before
        for (name, before), (_, after) in zip(base.named_parameters(), merged.named_parameters(), strict=True)
        if not torch.equal(before, after)
    }
    assert deltas.keys() == adapter.factors.keys()
    for name, (a, b) in adapter.factors.items():
        torch.testing.assert_close(a @ b, deltas[name].T, atol=2e-6, rtol=1e-5)


def test_gpt2_convolutions_are_read_in_their_own_orientation(make_causal_model, write_adapter, tmp_path):
    base = make_causal_model("gpt2")
    adapter = read_adapter(write_adapter(base, tmp_path))
    check_adapter_fits(adapter, base)
    assert adapter.fan_in_fan_out
    assert adapter.factors["transformer.h.0.attn.c_attn"][1].shape == (4, 96)


def test_a_saved_reading_of_the_config_names_base_and_task(base, write_adapter, tmp_path, tiny_base_dir):
    adapter = read_adapter(set_config(write_adapter(base, tmp_path), base_model_name_or_path=str(tiny_base_dir)))
    assert (adapter.base_name, adapter.task_type, adapter.base_fingerprint) == (str(tiny_base_dir), "CAUSAL_LM", None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, r"of type 'IA3'; expected 'LORA'"),
        ({"use_dora": True}, r"sets use_dora=True; only plain LoRA can be combined: train without use_dora"),
        ({"modules_to_save": ["lm_head"]}, r"sets modules_to_save=\['lm_head'\].*train without modules_to_save"),
        ({"bias": "all"}, r"sets bias='all'.*bias='none'"),
        ({"lora_bias": True}, r"sets lora_bias=True.*lora_bias=False"),
        ({"target_parameters": ["mlp.experts"]}, r"sets target_parameters=.*linear modules in target_modules"),
        ({"trainable_token_indices": [1, 2]}, r"sets trainable_token_indices=.*share the embeddings"),
        ({"layer_replication": [[0, 1], [0, 2]]}, r"sets layer_replication="),
        ({"alora_invocation_tokens": [1]}, r"sets alora_invocation_tokens="),
        ({"megatron_config": {"a": 1}}, r"sets megatron_config="),
        ({"a_later_invention": "yes"}, r"sets a_later_invention='yes'"),
        ({"init_lora_weights": "pissa"}, r"sets init_lora_weights='pissa', which changes the base"),
        ({"init_lora_weights": "olora"}, r"init_lora_weights='olora'"),
        ({"init_lora_weights": "corda"}, r"init_lora_weights='corda'"),
        ({"r": None}, r"expected a number for r, got None"),
        ({"r": "x"}, r"expected a number for r, got 'x'"),
        ({"r": 0}, r"expected a number for r, got 0"),
        ({"r": 2.5}, r"expected a number for r, got 2.5"),
        ({"r": True}, r"expected a number for r, got True"),
        ({"lora_alpha": None}, r"expected a number for lora_alpha, got None"),
        ({"lora_alpha": math.inf}, r"expected a number for lora_alpha, got inf"),
        ({"lora_alpha": math.nan}, r"expected a number for lora_alpha, got nan"),
        ({"lora_alpha": [8]}, r"expected a number for lora_alpha, got \[8\]"),
        ({"lora_alpha": 10**400}, r"expected a number for lora_alpha, got 1000"),
        ({"rank_pattern": {"q_proj(": 2}}, r"rank_pattern 'q_proj\(' is no regular expression"),
        ({"rank_pattern": ["q_proj"]}, r"expected rank_pattern to map modules to numbers"),
        ({"rank_pattern": {"q_proj": None}}, r"expected a number for q_proj, got None"),
        ({"alpha_pattern": {"[": 2}}, r"alpha_pattern '\[' is no regular expression"),
        ({"alpha_pattern": {"q_proj": "2"}}, r"expected a number for q_proj, got '2'"),
        ({"base_model_name_or_path": ["a"]}, r"expected base_model_name_or_path to be a text"),
        ({"peft_type": None}, r"of type None; expected 'LORA'"),
        ({"r": 5}, r"expected both, of rank 5 as adapter_config.json says: save it again"),
    ],
)
def test_anything_but_plain_lora_is_refused(adapter_dir, settings, message):
    with pytest.raises(ValueError, match=message):
        read_adapter(set_config(adapter_dir, **settings))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"trainable_token_indices": [1]}])
def test_what_peft_really_writes_for_other_kinds_is_refused(base, write_adapter, tmp_path, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        read_adapter(write_adapter(base, tmp_path, **settings))


def test_missing_or_broken_files_are_refused(adapter_dir, tmp_path):
    with pytest.raises(ValueError, match="is not a directory; expected the directory of a LoRA adapter"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no adapter_config.json"):
        read_adapter(tmp_path)
    tensors = adapter_dir / "adapter_model.safetensors"
    tensors.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_adapter(adapter_dir)
    tensors.rename(adapter_dir / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"holds no adapter_model.safetensors \(adapter_model.bin is a pickle"):
        read_adapter(adapter_dir)
    (adapter_dir / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_adapter(adapter_dir)
    for content in ("[]", '"LORA"', "null", "3"):
        (adapter_dir / "adapter_config.json").write_text(content)
        with pytest.raises(UserError, match=r"holds a PEFT adapter of type .*; expected 'LORA'"):
            read_adapter(adapter_dir)
    (adapter_dir / "adapter_config.json").write_bytes(b'{"r": "\xff"}')
    with pytest.raises(UserError, match="is not valid JSON"):
        read_adapter(adapter_dir)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_no_numbers_are_refused_by_the_tensors_name(adapter_dir, value, dtype):
    file = adapter_dir / "adapter_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    assert read_adapter(adapter_dir)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[name][3, 1] = value
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"holds values in '{name}' that are no finite numbers"):
        read_adapter(adapter_dir)


@pytest.mark.parametrize("content", ["[]", "{nope", "3"])
def test_a_damaged_card_of_a_policy_is_one_line(adapter_dir, content):
    (adapter_dir / "policy.json").write_text(content)
    with pytest.raises(UserError, match=r"policy\.json is damaged"):
        read_adapter(adapter_dir)


def test_unexpected_missing_or_no_tensors_are_refused(adapter_dir):
    file = adapter_dir / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(name for name in tensors if "lora_A" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, file)
    with pytest.raises(ValueError, match=r"lora_A, lora_B of shapes \[None, "):
        read_adapter(adapter_dir)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.ones(2, 2)}, file)
    with pytest.raises(ValueError, match=r"holds the tensor 'base_model.model.lm_head.weight' of shape"):
        read_adapter(adapter_dir)
    save_file({}, file)
    with pytest.raises(ValueError, match="holds no tensors"):
        read_adapter(adapter_dir)


def test_an_adapter_on_embeddings_or_head_is_refused(base, write_adapter, tmp_path):
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        on_embeddings = write_adapter(base, tmp_path / "embedding", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match=r"embed_tokens.*train without adapting embeddings"):
        read_adapter(on_embeddings)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        on_head = write_adapter(base, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    # PEFT also stores a copy of the head's own weights, which is refused when it is read
    with pytest.raises(ValueError, match=r"holds the tensor 'base_model.model.lm_head.*weight'"):
        read_adapter(on_head)
    file = on_head / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "lora_" in name}, file)
    with pytest.raises(ValueError, match="adapts 'lm_head', an embedding or output head, which all"):
        check_adapter_fits(read_adapter(on_head), base)


def test_an_adapter_of_another_shape_or_family_is_refused(base, adapter_dir, make_causal_model):
    adapter = read_adapter(adapter_dir)
    check_adapter_fits(adapter, base)
    with pytest.raises(ValueError, match=r"48 to 32 features at 'model.layers.0.mlp.down_proj', but the base has 64"):
        check_adapter_fits(adapter, make_causal_model("llama", intermediate_size=64))
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.down_proj', which LlamaForCausalLM does not have"):
        check_adapter_fits(adapter, make_causal_model("llama", num_hidden_layers=1))
    with pytest.raises(ValueError, match="which GPT2LMHeadModel does not have"):
        check_adapter_fits(adapter, make_causal_model("gpt2"))


def test_a_base_that_already_carries_adapters_is_refused(base, adapter_dir):
    injected = PeftModel.from_pretrained(deepcopy(base), str(adapter_dir)).get_base_model()
    with pytest.raises(ValueError, match=r"expected a Linear or Conv1D of a bare base model"):
        check_adapter_fits(read_adapter(adapter_dir), injected)


def test_a_recorded_fingerprint_tells_bases_apart(base, adapter_dir, make_causal_model):
    (adapter_dir / "policy.json").write_text(json.dumps({"base_fingerprint": base_fingerprint(base)}))
    adapter = read_adapter(adapter_dir)
    check_adapter_fits(adapter, base)
    with pytest.raises(ValueError, match=r"was trained on another base .*: their weights differ; load that base"):
        check_adapter_fits(adapter, make_causal_model("llama", seed=1))


def test_fingerprint_is_the_same_in_bfloat16_and_after_saving(make_causal_model, tmp_path):
    base = make_causal_model("llama")
    fingerprint = base_fingerprint(base)
    base.save_pretrained(tmp_path)
    assert base_fingerprint(type(base).from_pretrained(tmp_path)) == fingerprint
    assert base_fingerprint(base.to(torch.bfloat16)) == fingerprint
    base.model.layers[1].mlp.up_proj.weight.data += 0.01
    assert base_fingerprint(base) != fingerprint


def test_another_base_name_without_fingerprint_only_warns(make_causal_model, adapter_dir, tiny_base_dir, caplog):
    base = make_causal_model("llama")
    base.name_or_path = str(tiny_base_dir)
    adapter = read_adapter(set_config(adapter_dir, base_model_name_or_path="org/other"))
    with caplog.at_level(logging.WARNING, "emorl"):
        check_adapter_fits(adapter, base)
    assert "trained on 'org/other'" in caplog.text
