import json
import shutil

import pytest
import torch

from emorl.config import UserError
from emorl.config.experiment import BaseConfig
from emorl.config.yaml import parse
from emorl.policies.base import dtype_of, load_base, read_policies


@pytest.fixture
def base(tiny_base_dir):
    return load_base(BaseConfig(model=str(tiny_base_dir)))


def test_policies_are_read_in_order_with_the_bases_tokenizer(base, write_adapter, tokenizer, tmp_path):
    directories = {name: write_adapter(base.model, tmp_path / name) for name in ("b", "a")}
    tokenizer.save_pretrained(directories["a"])
    assert list(read_policies(directories, base)) == ["b", "a"]


def test_a_policy_of_another_tokenizer_is_refused(base, write_adapter, tokenizer, tmp_path):
    directory = write_adapter(base.model, tmp_path / "a")
    tokenizer.save_pretrained(directory)
    content = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["!"], vocabulary["?"] = vocabulary["?"], vocabulary["!"]
    (directory / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"policy 'a' .* was trained with another tokenizer"):
        read_policies({"a": directory}, base)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", "{}", "policy 'a': the tokenizer in .*: transformers cannot load it"),
        ("tokenizer_config.json", "{nope", "tokenizer_config.json is no valid JSON"),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["mine.Mine", null]}}', "read that code, then say trust"),
    ],
)
def test_a_policys_damaged_tokenizer_or_one_with_code_is_one_line(
    base, write_adapter, tokenizer, tmp_path, file, text, message
):
    directory = write_adapter(base.model, tmp_path / "a")
    tokenizer.save_pretrained(directory)
    (directory / file).write_text(text)
    (directory / "mine.py").write_text("raise SystemExit('code of the tokenizer has run')")
    with pytest.raises(UserError, match=message) as caught:
        read_policies({"a": directory}, base)
    assert "\n" not in str(caught.value)


def test_what_is_no_adapter_is_refused_by_name(base, tmp_path):
    with pytest.raises(UserError, match="policy 'a': "):
        read_policies({"a": tmp_path / "nothing"}, base)


def test_a_base_is_frozen_and_an_encoder_decoder_is_padded_on_the_right(base, make_seq2seq_model, tokenizer, tmp_path):
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.tokenizer.padding_side == "left"
    make_seq2seq_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder_decoder = load_base(BaseConfig(model=str(tmp_path)))
    assert encoder_decoder.model.config.is_encoder_decoder
    assert encoder_decoder.tokenizer.padding_side == "right"


def test_a_pickled_base_is_never_loaded(tiny_base_dir, tmp_path):
    copy = tmp_path / "pickled"
    shutil.copytree(tiny_base_dir, copy)
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_base(BaseConfig(model=str(copy)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_on_a_cpu_auto_is_float32_whatever_the_checkpoint_is_in(make_causal_model, tokenizer, tmp_path, dtype, monkeypatch):
    make_causal_model().to(getattr(torch, dtype)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    auto, named = BaseConfig(model=str(tmp_path)), BaseConfig(model=str(tmp_path), dtype=dtype)
    assert load_base(named).model.dtype == dtype_of(named) == getattr(torch, dtype)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_base(auto).model.dtype == dtype_of(auto) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dtype_of(auto) == getattr(torch, dtype)


def test_attention_is_what_the_block_names(tiny_base_dir):
    for name in ("eager", "sdpa"):
        model = load_base(BaseConfig(model=str(tiny_base_dir), attn_implementation=name)).model
        assert model.config._attn_implementation == name
    with pytest.raises(UserError, match=r"base\.model .*nope"):
        load_base(BaseConfig(model=str(tiny_base_dir), attn_implementation="nope"))


@pytest.mark.parametrize(
    "settings", [{"revision": "main"}, {"device_map": "auto"}, {"quantization": {"bits": 4}}, {"attn_implementation": "eager"}]
)
def test_a_loaded_model_cannot_be_loaded_otherwise(base, settings):
    [key] = settings
    with pytest.raises(ValueError, match=f"base.{key}: the model given is loaded already"):
        BaseConfig(model=base.model, **settings)
    with pytest.raises(UserError, match="expected 4 or 8"):
        parse(BaseConfig, {"model": "a", "quantization": {"bits": 3}}, "file")
