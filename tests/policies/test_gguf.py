"""A GGUF file is a base like any other: unpacked, trainable, and known by its file."""

import shutil

import numpy as np
import pytest
import torch

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.aggregation.saved import reference_to
from emorl.config import UserError
from emorl.config.experiment import BaseConfig
from emorl.policies.adapters import read_adapter
from emorl.policies.base import load_base

gguf = pytest.importorskip("gguf", reason="the extra gguf")

GREEDY = {"max_new_tokens": 6, "do_sample": False}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def halves_together(weight, heads):
    """llama.cpp rotates neighbouring features where transformers rotates the halves of a head."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def model(make_causal_model):
    return make_causal_model("llama", vocab_size=262)


@pytest.fixture(scope="module")
def file(model, tokenizer, tmp_path_factory):
    return write_base(model, tokenizer, tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf")


def write_base(model, tokenizer, place, deltas=None):
    """A tiny Llama and its tokenizer as a GGUF file; `deltas` are added to tensors of these names there."""
    config = model.config
    writer = gguf.GGUFWriter(place, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*words, "ĀĀ"])
    writer.add_token_types([*(3 if word in tokenizer.all_special_tokens else 1 for word in words), 1])
    writer.add_token_merges(["Ā Ā"])  # of two bytes 0: such a file has one merge at least
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        parts = name.removesuffix(".weight").removeprefix("model.layers.").partition(".")
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            values = halves_together(values, config.num_attention_heads if "q_" in name else config.num_key_value_heads)
        short = NAMES.get(name.removesuffix(".weight")) or f"blk.{parts[0]}.{NAMES[parts[2]]}"
        added = (deltas or {}).get(f"{short}.weight", 0)
        writer.add_tensor(f"{short}.weight", np.ascontiguousarray(values + np.asarray(added, dtype=np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return place


@pytest.fixture(scope="module")
def base(file):
    return load_base(BaseConfig(model=str(file)))


def test_the_file_is_the_model_it_was_made_of(base, model, tokenizer):
    inputs = tokenizer(["say yes", "no"], return_tensors="pt", padding=True)
    torch.testing.assert_close(base.model(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert base.tokenizer.chat_template == tokenizer.chat_template
    assert base.tokenizer("say yes").input_ids == tokenizer("say yes").input_ids
    assert base.tokenizer.padding_side == "left"


def test_it_can_be_saved_and_trained_like_any_other(base, tmp_path):
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    plain = load_base(BaseConfig(model=str(tmp_path))).model
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), base.model.parameters(), strict=True))
    assert not getattr(base.model, "is_quantized", False)


@pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")  # PEFT looks for one, and goes on
def test_policies_and_saved_ensembles_name_the_file(base, file, write_adapter, tokenizer, tmp_path):
    path = write_adapter(base.model, tmp_path / "adapter")
    assert read_adapter(path).base_name == str(file)
    inputs = tokenizer(["say yes"], return_tensors="pt")
    ensemble = HiddenStateEnsemble(base.model, {"a": read_adapter(path)})
    ensemble.save_pretrained(tmp_path / "saved")
    loaded = HiddenStateEnsemble.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.generate(**inputs, **GREEDY), ensemble.generate(**inputs, **GREEDY))


def test_a_file_on_the_hub_is_referred_to_by_its_name_there(file, tmp_path):
    assert reference_to("org/model/tiny.gguf", tmp_path) == {"hub": "org/model/tiny.gguf"}
    assert reference_to(str(file), tmp_path)["absolute"] == str(file)
    assert reference_to("nowhere/at/all/tiny.gguf", tmp_path) is None


@pytest.mark.parametrize("size", [0, 3, 200, 5000, -100])
def test_a_cut_file_is_one_line(file, tmp_path, size):
    shutil.copyfile(file, tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match=r"base\.model .*cut\.gguf") as caught:
        load_base(BaseConfig(model=str(tmp_path / "cut.gguf")))
    assert "\n" not in str(caught.value)


def test_without_the_extra_it_is_one_line(file, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package gguf: pip install 'emorl\[gguf\]'"):
        load_base(BaseConfig(model=str(file), revision="another"))


def test_bits_of_its_own_and_bits_that_are_asked_for_do_not_go_together(file):
    with pytest.raises(ValueError, match=r"base\.quantization: a GGUF file is unpacked while loading"):
        BaseConfig(model=str(file), quantization={"bits": 4})
