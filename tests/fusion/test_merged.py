"""A merged checkpoint is the base with the policies' sum in its weights, and a plain model of transformers'."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from emorl.config import UserError
from emorl.fusion.checkpoints import open_checkpoint
from emorl.fusion.merged import check_same_base, write_merged
from emorl.fusion.one_rank import one_rank
from emorl.policies.adapters import base_fingerprint, read_adapter


def merged(folder, base, adapter, dtype=torch.float32):
    folder.mkdir(exist_ok=True)
    modules = one_rank([adapter], [1.0])
    write_merged(folder, open_checkpoint(base), modules, fan_in_fan_out=adapter.fan_in_fan_out, dtype=dtype)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt2", "phi"])
def test_a_merged_model_is_the_adapted_one(family, tied, make_causal_model, write_adapter, tokenizer, tmp_path):
    base = make_causal_model(family, tie_word_embeddings=tied)
    base.generation_config.max_new_tokens = 7
    base.save_pretrained(tmp_path / "base")
    path = write_adapter(base, tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(merged(tmp_path / "out", tmp_path / "base", read_adapter(path)))
    inputs = tokenizer(["a prompt", "more"], return_tensors="pt", padding=True)
    adapted = PeftModel.from_pretrained(base, str(path)).eval()
    torch.testing.assert_close(loaded(**inputs).logits, adapted(**inputs).logits, atol=2e-4, rtol=1e-4)
    assert torch.equal(loaded.generate(**inputs, do_sample=False), adapted.generate(**inputs, do_sample=False))
    assert loaded.generation_config.max_new_tokens == 7
    tensors = open_checkpoint(tmp_path / "out").entries
    assert tensors.keys() == open_checkpoint(tmp_path / "base").entries.keys()  # a tied head stays one tensor


@torch.no_grad()
def test_an_encoder_decoder_too(make_seq2seq_model, write_adapter, plain_tokenizer, tmp_path):
    base = make_seq2seq_model()
    base.save_pretrained(tmp_path / "base")
    path = write_adapter(base, tmp_path / "policy", target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(merged(tmp_path / "out", tmp_path / "base", read_adapter(path)))
    inputs = plain_tokenizer(["a prompt", "more"], return_tensors="pt", padding=True)
    adapted = PeftModel.from_pretrained(base, str(path)).eval()
    wanted = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(loaded.generate(**inputs, **wanted), adapted.generate(**inputs, **wanted))


def test_what_is_rounded_is_the_sum_and_the_config_says_the_type(make_causal_model, write_adapter, tmp_path):
    base = make_causal_model("llama")
    base.save_pretrained(tmp_path / "base")
    adapter = read_adapter(write_adapter(base, tmp_path / "policy"))
    exact = AutoModelForCausalLM.from_pretrained(merged(tmp_path / "exact", tmp_path / "base", adapter))
    rounded = merged(tmp_path / "rounded", tmp_path / "base", adapter, torch.bfloat16)
    assert json.loads((rounded / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(rounded)
    for (name, one), other in zip(loaded.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(one, other.to(torch.bfloat16)), name


def test_a_base_that_policies_do_not_fit_is_refused(make_causal_model, write_adapter, tmp_path):
    base = make_causal_model("llama")
    adapter = read_adapter(write_adapter(base, tmp_path / "policy", target_modules=["down_proj"]))
    make_causal_model("llama", intermediate_size=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"one of \[32, 64\] for 'model.layers.0.mlp.down_proj.weight', expected \[32, 48\]"):
        merged(tmp_path / "out", tmp_path / "wide", adapter)
    make_causal_model("gpt2").save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="no such tensor for 'model"):
        merged(tmp_path / "out", tmp_path / "other", adapter)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "phi"])
@pytest.mark.parametrize("tied", [False, True])
def test_another_base_of_the_same_shapes_is_refused_by_its_fingerprint(family, tied, make_causal_model, tmp_path):
    base, other = (make_causal_model(family, seed, tie_word_embeddings=tied) for seed in (0, 1))
    base.save_pretrained(tmp_path / "base")
    checkpoint = open_checkpoint(tmp_path / "base")
    check_same_base(checkpoint, base.config, base_fingerprint(base))
    check_same_base(checkpoint, base.config, None)
    with pytest.raises(UserError, match="holds other weights than the base that the policies were trained on"):
        check_same_base(checkpoint, base.config, base_fingerprint(other))


def test_an_encoder_decoders_fingerprint_is_read_from_its_files(make_seq2seq_model, tmp_path):
    base = make_seq2seq_model()
    base.save_pretrained(tmp_path / "base")
    check_same_base(open_checkpoint(tmp_path / "base"), base.config, base_fingerprint(base))
    with pytest.raises(UserError, match="holds other weights"):
        check_same_base(open_checkpoint(tmp_path / "base"), base.config, base_fingerprint(make_seq2seq_model(1)))
