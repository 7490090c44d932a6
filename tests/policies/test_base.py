import json
import shutil

import pytest
import torch

from emorl.config import UserError
from emorl.config.experiment import BaseConfig
from emorl.policies.base import load_base, read_policies


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
