"""A base of which layers lie on disk or apart in the CPU's memory gives the same tokens, and is the same base."""

import json
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel

from emorl.aggregation.ensemble import HiddenStateEnsemble, ParameterAverage
from emorl.aggregation.trie import TrieDecoder
from emorl.config import UserError
from emorl.config.experiment import BaseConfig
from emorl.evaluation.scoring import generate
from emorl.fusion.loaded import loaded_adapters
from emorl.policies.adapters import base_fingerprint, read_adapter
from emorl.policies.base import Base, load_base
from emorl.training.trainers import build_trainer

GREEDY = {"max_new_tokens": 6, "do_sample": False}
ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}
FAMILIES = {"untied": {}, "tied": {"tie_word_embeddings": True}}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory, make_causal_model, tokenizer):
    place = tmp_path_factory.mktemp(request.param)
    make_causal_model("llama", **FAMILIES[request.param]).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def whole(folder):
    return load_base(BaseConfig(model=str(folder))).model


@pytest.fixture(params=["disk", "memory"])
def apart(request, folder, whole):
    if request.param == "memory":  # a CPU without a GPU has no other memory that transformers would offload to
        return cpu_offload(load_base(BaseConfig(model=str(folder))).model, execution_device=torch.device("cpu"))
    head = {} if whole.config.tie_word_embeddings else {"lm_head": "disk"}
    return load_base(BaseConfig(model=str(folder), device_map=ON_DISK | {"lm_head": "cpu"} | head)).model


@pytest.fixture(scope="module")
def paths(whole, write_adapter, tmp_path_factory):
    return [write_adapter(whole, tmp_path_factory.mktemp("adapter"), seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def inputs(tokenizer):
    return tokenizer(["say yes", "no", "a longer prompt"], return_tensors="pt", padding=True)


def adapters(paths):
    return {name: read_adapter(path) for name, path in zip("ab", paths, strict=True)}


def test_layers_lie_apart_and_the_base_is_the_same(apart, whole, inputs):
    assert any(parameter.is_meta for parameter in apart.parameters())
    assert base_fingerprint(apart) == base_fingerprint(whole)
    assert torch.equal(apart(**inputs).logits, whole(**inputs).logits)


@pytest.mark.parametrize("mixture", [HiddenStateEnsemble, ParameterAverage])
def test_policies_on_it_give_the_same_tokens(apart, whole, paths, inputs, mixture):
    here, there = (mixture(base, adapters(paths), [0.75, 0.5]) for base in (whole, apart))
    assert here.device == there.device == torch.device("cpu")
    assert torch.equal(here(**inputs).logits, there(**inputs).logits)
    assert torch.equal(here.generate(**inputs, **GREEDY), there.generate(**inputs, **GREEDY))
    assert torch.equal(whole(**inputs).logits, apart(**inputs).logits)  # which is left as it was


def test_all_weight_on_one_policy_is_that_policy_as_peft_runs_it(apart, whole, paths, inputs):
    ensemble = HiddenStateEnsemble(apart, adapters(paths))
    for index, path in enumerate(paths):
        weights = [float(index == other) for other in range(2)]
        alone = ensemble.generate(**inputs, **GREEDY, weights=weights)
        assert torch.equal(alone, PeftModel.from_pretrained(load_of(whole), str(path)).generate(**inputs, **GREEDY))


def load_of(model):
    return load_base(BaseConfig(model=model.name_or_path)).model


def test_the_trie_gives_the_same_tokens(apart, whole, paths, inputs):
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.25, 0.75]])
    here, there = (
        TrieDecoder(HiddenStateEnsemble(base, adapters(paths)), **inputs, max_new_tokens=6).decode(weights)
        for base in (whole, apart)
    )
    assert torch.equal(here, there)


def test_no_value_is_copied(apart, paths):
    ensemble = HiddenStateEnsemble(apart, adapters(paths))
    layer = "model.layers.1.mlp.up_proj"
    ours, theirs = ensemble.policies.get_submodule(f"{layer}.linear"), apart.get_submodule(layer)
    assert ours.weight.is_meta
    assert ours._hf_hook.weights_map is theirs._hf_hook.weights_map


def test_evaluation_and_a_saved_ensemble_take_it(apart, whole, paths, tokenizer, tmp_path):
    prompts = ["say yes", "no"]
    expected = generate(whole, tokenizer, prompts, GREEDY)["completion"].tolist()
    assert generate(apart, tokenizer, prompts, GREEDY)["completion"].tolist() == expected
    HiddenStateEnsemble(whole, adapters(paths)).save_pretrained(tmp_path / "saved")
    loaded = HiddenStateEnsemble.from_pretrained(tmp_path / "saved", base=apart)
    mixed = generate(HiddenStateEnsemble(whole, adapters(paths)), tokenizer, prompts, GREEDY)["completion"].tolist()
    assert generate(loaded, tokenizer, prompts, GREEDY)["completion"].tolist() == mixed


@pytest.mark.parametrize("disk", ["decoder.block.1", "encoder.block.0"])
def test_an_encoder_decoder_takes_it_too(tiny_seq2seq_dir, write_adapter, plain_tokenizer, tmp_path, disk):
    places = ["shared", "encoder.embed_tokens", "encoder.final_layer_norm", "decoder.embed_tokens", "decoder.final_layer_norm"]
    places += ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1", "lm_head"]
    where = {name: "disk" if name == disk else "cpu" for name in places}
    here, there = (
        load_base(BaseConfig(model=str(tiny_seq2seq_dir), device_map=device_map)).model for device_map in (None, where)
    )
    assert base_fingerprint(here) == base_fingerprint(there)
    lora = {"target_modules": ["q", "v", "wi", "wo"], "task_type": "SEQ_2_SEQ_LM"}
    paths = [write_adapter(here, tmp_path / name, seed=seed, **lora) for seed, name in enumerate("ab")]
    inputs = plain_tokenizer(["say yes", "no"], return_tensors="pt", padding=True)
    whole, apart = (HiddenStateEnsemble(base, adapters(paths), [0.75, 0.5]) for base in (here, there))
    assert torch.equal(whole.generate(**inputs, **GREEDY), apart.generate(**inputs, **GREEDY))


def test_a_tied_head_apart_from_its_embeddings_is_one_line(tiny_seq2seq_dir):
    where = dict.fromkeys(("shared", "encoder", "decoder"), "cpu") | {"lm_head": "disk"}
    with pytest.raises(UserError, match=r"base\.device_map: lm_head.weight is tied to another parameter"):
        load_base(BaseConfig(model=str(tiny_seq2seq_dir), device_map=where))


def test_what_changes_the_base_refuses_one_that_is_offloaded(apart, whole, paths, tokenizer):
    match = r"base\.device_map: .* some of its layers are offloaded"
    with pytest.raises(UserError, match=match):
        loaded_adapters(apart, list(adapters(paths).values()))
    everything: Any = None
    with pytest.raises(UserError, match=f"{match}.*or base.quantization"):
        build_trainer(
            everything, everything, everything, everything, base=Base(apart, tokenizer), splits=everything, objectives=[],
            generation={}, run=everything,
        )  # fmt: skip
    assert loaded_adapters(whole, list(adapters(paths).values())).names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device_map": {"": "moon"}}, r"base\.model.*Expected one of cpu, cuda"),
        ({"device_map": "nearby"}, r"base\.model.*device_map"),
        ({"device_map": {"": "disk"}, "dtype": "bfloat16"}, None),
    ],
)
def test_a_map_that_leads_nowhere_is_one_line(folder, settings, message):
    config = BaseConfig(model=str(folder), **json.loads(json.dumps(settings)))
    if message is None:
        assert load_base(config).model.dtype == torch.bfloat16
        return
    with pytest.raises(UserError, match=message) as caught:
        load_base(config)
    assert "\n" not in str(caught.value)
