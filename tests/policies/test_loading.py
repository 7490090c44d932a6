"""Damaged, partial and foreign files of a base: each is one line, and none is believed."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from emorl.config import UserError
from emorl.config.experiment import BaseConfig
from emorl.objectives.models.frozen_model import load_frozen
from emorl.policies.base import load_base
from emorl.policies.loading import read_model, read_tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tiny_base_dir, tmp_path):
    return shutil.copytree(tiny_base_dir, tmp_path / "base")


def cut(size):
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def change(name, **settings):
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | settings))


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def without(*tensors):
    def damage(folder):
        kept = {name: value for name, value in load_file(folder / WEIGHTS).items() if not name.startswith(tensors)}
        save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def only_a_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def code_of_its_own(name, kind):
    def damage(folder):
        change(name, auto_map={kind: "mine.Mine"}, model_type="mine", tokenizer_class="Mine")(folder)
        (folder / "mine.py").write_text("raise SystemExit('code of the model has run')")

    return damage


DAMAGES = {
    "weights cut at the end": (cut(-1000), "transformers cannot load it"),
    "weights cut in the header": (cut(300), "transformers cannot load it"),
    "empty weights": (cut(0), "transformers cannot load it"),
    "a pointer of git lfs": (
        write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\nsize 3\n"),
        "transformers cannot load it",
    ),
    "no weights": (remove(WEIGHTS), "no file named model.safetensors"),
    "only a pickle": (only_a_pickle, "safetensors"),
    "an index that is no JSON": (lambda f: (remove(WEIGHTS)(f), write(f"{WEIGHTS}.index.json", "{")(f)), "index.json is no"),
    "an index without its files": (
        lambda f: (
            remove(WEIGHTS)(f),
            write(f"{WEIGHTS}.index.json", '{"metadata": {}, "weight_map": {"a": "b.safetensors"}}')(f),
        ),
        "b.safetensors",
    ),
    "a layer is missing": (without("model.layers.1."), r"lack 9 of the model's tensors, such as model.layers.1"),
    "the head is missing": (without("lm_head"), r"lack 1 of the model's tensors, such as lm_head.weight"),
    "a layer too many in the config": (change("config.json", num_hidden_layers=3), "lack 9 of the model's tensors"),
    "another width in the config": (change("config.json", intermediate_size=64), r"has shape \(.*48.*config.json expects"),
    "a config that is no JSON": (write("config.json", "{nope"), "config.json is no valid JSON"),
    "a config that is a list": (write("config.json", "[]"), "base.model"),
    "a config of another type": (change("config.json", hidden_size="many"), "hidden_size"),
    "an unknown family": (change("config.json", model_type="nope"), "nope"),
    "no config": (remove("config.json"), "base.model"),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "base.model"),
    "a tokenizer of nothing": (write("tokenizer.json", "{}"), "transformers cannot load it .*added_tokens"),
    "a tokenizer that is no JSON": (write("tokenizer.json", '{"model": '), "tokenizer.json is no valid JSON"),
    "a tokenizer that is a list": (write("tokenizer.json", "[]"), "transformers cannot load it"),
    "a tokenizer without vocabulary": (change("tokenizer.json", model={}), "transformers cannot load it"),
    "tokenizer settings that are no JSON": (write("tokenizer_config.json", "{nope"), "tokenizer_config.json is no valid JSON"),
    "tokenizer settings that are a list": (write("tokenizer_config.json", "[]"), "base.model"),
    "a template with a mistake": (write("chat_template.jinja", "{% for %}"), "TemplateSyntaxError"),
    "code of the tokenizer's own": (code_of_its_own("tokenizer_config.json", "AutoTokenizer"), "trust_remote_code: true"),
    "code of the model's own": (code_of_its_own("config.json", "AutoConfig"), "trust_remote_code: true"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_base_is_one_line(damage, folder):
    change_files, message = DAMAGES[damage]
    change_files(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_base(BaseConfig(model=str(folder)))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("base.model")


@pytest.mark.parametrize("place", ["/nowhere", "nobody/nothing", "a b c", "..", "nul\0", "a" * 5000, "none.gguf", "~/none"])
def test_what_is_no_model_is_one_line(place):
    with pytest.raises(UserError, match=r"base\.model") as caught:
        load_base(BaseConfig(model=place))
    assert "\n" not in str(caught.value)


def test_tied_weights_are_no_lack(make_causal_model, tokenizer, tmp_path):
    model = make_causal_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    loaded = load_base(BaseConfig(model=str(tmp_path))).model
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_input_embeddings().weight)


def test_an_adapter_is_no_base(make_causal_model, write_adapter, tokenizer, tmp_path):
    folder = write_adapter(make_causal_model(), tmp_path / "adapter")
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="is a LoRA adapter, no model; name the base"):
        load_base(BaseConfig(model=str(folder)))


def test_a_new_head_may_be_missing_and_a_frozen_one_may_not(tiny_base_dir):
    kind, place = AutoModelForSequenceClassification, str(tiny_base_dir)
    assert read_model(kind, place, "model", is_new=lambda model, tensor: tensor == "score.weight", num_labels=1)
    with pytest.raises(UserError, match=r"lack 1 of the model's tensors, such as score.weight"):
        load_frozen(kind, place, "auto")


def test_an_encoder_whose_states_are_averaged_needs_no_pooler(save_word_encoder, tmp_path):
    folder = tmp_path / "encoder"
    save_word_encoder(folder, ["a"])
    without("pooler")(folder)
    assert load_frozen(AutoModel, str(folder), "auto")
    without("encoder")(folder)
    with pytest.raises(UserError, match=r"lack \d+ of the model's tensors, such as encoder"):
        load_frozen(AutoModel, str(folder), "auto")


def test_a_model_is_frozen_and_its_code_is_run_only_where_it_is_trusted(folder):
    code_of_its_own("config.json", "AutoConfig")(folder)
    with pytest.raises(UserError, match="read that code, then say trust_remote_code: true"):
        read_model(AutoModelForCausalLM, str(folder), "model")
    with pytest.raises(SystemExit, match="code of the model has run"):
        read_model(AutoModelForCausalLM, str(folder), "model", trust_remote_code=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_one_line(folder):
    (folder / "tokenizer.json").chmod(0)
    with pytest.raises(UserError, match="tokenizer"):
        read_tokenizer(str(folder), "base.model")
