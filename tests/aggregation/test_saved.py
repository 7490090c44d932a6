"""An ensemble in a folder that can be copied alone, and weights by name: the same tokens as before."""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from emorl.aggregation.ensemble import HiddenStateEnsemble, ParameterAverage
from emorl.aggregation.trie import TrieDecoder
from emorl.config import UserError
from emorl.policies.adapters import Adapter, read_adapter

GREEDY = {"max_new_tokens": 10, "do_sample": False}
FRONT = [
    {"weights": {"kind": 0.9, "short": 0.1}, "scores": {"empathy": 0.8, "brevity": 0.2}, "value": 0.5},
    {"weights": {"kind": 0.2, "short": 0.8}, "scores": {"empathy": 0.3, "brevity": 0.9}, "value": 0.6},
]


@pytest.fixture(scope="module")
def base(tiny_base_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_base_dir)


@pytest.fixture
def adapters(base, write_adapter, tmp_path) -> dict[str, Adapter]:
    paths = [write_adapter(base, tmp_path / "run" / name, seed=seed) for seed, name in enumerate(["kind", "short"])]
    return {path.name: read_adapter(path) for path in paths}


@pytest.fixture(scope="module")
def inputs(tokenizer):
    return tokenizer(["hello", "how are you"], return_tensors="pt", padding=True)


@pytest.fixture(params=[HiddenStateEnsemble, ParameterAverage])
def mixture(request) -> type[HiddenStateEnsemble] | type[ParameterAverage]:
    return request.param


def test_saved_copied_and_loaded_it_gives_the_same_tokens(base, adapters, inputs, mixture, tmp_path, tokenizer):
    model = mixture(base, adapters, weights=[0.9, 0.2], include_base=False)
    model.save_pretrained(tmp_path / "run" / "ensemble", tokenizer=tokenizer)
    expected = {
        key: model.generate(**inputs, **GREEDY, **options)
        for key, options in (("saved", {}), ("beams", {"num_beams": 2}), ("one", {"weights": [1.0, 0.0]}))
    }
    peft = PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "run" / "kind")).eval()
    alone = peft.generate(**inputs, **GREEDY)
    shutil.copytree(tmp_path / "run" / "ensemble", tmp_path / "copy")
    shutil.rmtree(tmp_path / "run")
    loaded = mixture.from_pretrained(tmp_path / "copy")
    assert (loaded.policy_names, loaded.weights) == (model.policy_names, model.weights)
    assert torch.equal(loaded.generate(**inputs, **GREEDY), expected["saved"])
    assert torch.equal(loaded.generate(**inputs, **GREEDY, num_beams=2), expected["beams"])
    assert torch.equal(loaded.generate(**inputs, **GREEDY, weights={"kind": 1.0}), expected["one"])
    assert torch.equal(alone, expected["one"])
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").get_vocab() == tokenizer.get_vocab()
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(mixture.from_pretrained(tmp_path / "again").generate(**inputs, **GREEDY), expected["saved"])


def test_a_preference_chooses_another_point_of_the_front(base, adapters, tmp_path):
    ensemble = HiddenStateEnsemble(base, adapters, FRONT[1]["weights"])
    ensemble.save_pretrained(tmp_path / "ensemble", front=FRONT)
    load = HiddenStateEnsemble.from_pretrained
    assert load(tmp_path / "ensemble").weights == (0.2, 0.8)
    assert load(tmp_path / "ensemble", prefer={"empathy": 0.7, "brevity": 0.3}).weights == (0.9, 0.1)
    assert load(tmp_path / "ensemble", weights={"short": 2}).weights == (0.0, 2.0)
    with pytest.raises(UserError, match="preferences name empathie; did you mean 'empathy'"):
        load(tmp_path / "ensemble", prefer={"empathie": 1})
    ensemble.save_pretrained(tmp_path / "ensemble")
    with pytest.raises(UserError, match="saved without a front"):
        load(tmp_path / "ensemble", prefer={"empathy": 1})


def test_weights_by_name_are_those_in_order(base, adapters, inputs, tokenizer):
    ensemble = HiddenStateEnsemble(base, adapters, {"short": 0.7, "kind": 0.3})
    assert ensemble.weights == (0.3, 0.7)
    by_order = ensemble.generate(**inputs, **GREEDY, weights=[[0.3, 0.7], [1.0, 0.0]])
    assert torch.equal(ensemble.generate(**inputs, **GREEDY, weights=[{"kind": 0.3, "short": 0.7}, {"kind": 1}]), by_order)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    trie = TrieDecoder(ensemble, inputs["input_ids"], inputs["attention_mask"], max_new_tokens=10, **ends)
    assert torch.equal(trie.decode([{"kind": 0.3, "short": 0.7}]), trie.decode([[0.3, 0.7]]))
    with pytest.raises(UserError, match="weights name 'knd', which is no policy; did you mean 'kind'"):
        ensemble.generate(**inputs, **GREEDY, weights={"knd": 1.0})
    with pytest.raises(ValueError, match="a row of zeros"):
        ensemble.weights = {"kind": 0.0}


def test_base_policy_and_data_type_are_saved(tiny_base_dir, adapters, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_base_dir, dtype=torch.bfloat16)
    HiddenStateEnsemble(base, adapters, [2, 0, -1], include_base=True).save_pretrained(tmp_path / "saved")
    loaded = HiddenStateEnsemble.from_pretrained(tmp_path / "saved")
    assert (loaded.dtype, loaded.weights, loaded.include_base) == (torch.bfloat16, (2, 0, -1), True)


def test_a_reference_that_has_gone_or_changed_is_named(base, adapters, mixture, tmp_path, make_causal_model):
    saved = tmp_path / "saved"
    mixture(base, adapters).save_pretrained(saved)
    with pytest.raises(ValueError, match=r"holds no ensemble.json; give the folder of a saved ensemble"):
        mixture.from_pretrained(tmp_path)
    other = ParameterAverage if mixture is HiddenStateEnsemble else HiddenStateEnsemble
    with pytest.raises(ValueError, match=f"holds a {mixture.__name__}, not a {other.__name__}"):
        other.from_pretrained(saved)
    file = saved / "ensemble.json"
    settings = json.loads(file.read_text())
    make_causal_model("llama", seed=5).save_pretrained(tmp_path / "elsewhere")
    file.write_text(json.dumps(settings | {"base": {"relative": "../elsewhere", "absolute": "/nowhere"}}))
    with pytest.raises(ValueError, match=r"was saved over another base than .* give that one"):
        mixture.from_pretrained(saved)
    file.write_text(json.dumps(settings | {"base": {"relative": "../nowhere", "absolute": "/nowhere"}}))
    with pytest.raises(ValueError, match=r"the base model in .*nowhere, which has gone; put it back, or give it"):
        mixture.from_pretrained(saved)
    file.write_text(json.dumps(settings))
    shutil.rmtree(saved / "adapters" / "short")
    with pytest.raises(ValueError, match=r"adapters/short is not a directory"):
        mixture.from_pretrained(saved)


def test_a_base_made_in_memory_is_named_by_its_fingerprint(make_causal_model, adapters, mixture, inputs, tmp_path):
    base = make_causal_model("llama")
    model = mixture(base, adapters, [0.5, 0.5])
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="made in memory; give that one as base="):
        mixture.from_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="saved over another base than the one given"):
        mixture.from_pretrained(tmp_path / "saved", base=make_causal_model("llama", seed=5))
    loaded = mixture.from_pretrained(tmp_path / "saved", base=base)
    assert torch.equal(loaded.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


def test_a_folder_with_other_files_is_left_alone(base, adapters, mixture, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds other files; give a folder of its own"):
        mixture(base, adapters).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="max_shard_size"):
        mixture(base, adapters).save_pretrained(tmp_path / "saved", max_shard_size="1GB")


def test_the_directory_tree_can_be_moved(tmp_path, make_causal_model, write_adapter, inputs):
    run = tmp_path / "run"
    make_causal_model("llama").save_pretrained(run / "base")
    base = AutoModelForCausalLM.from_pretrained(run / "base")
    model = HiddenStateEnsemble(base, {"one": read_adapter(write_adapter(base, run / "one"))})
    model.save_pretrained(run / "ensemble")
    expected = model.generate(**inputs, **GREEDY)
    moved = Path(run.rename(tmp_path / "moved"))
    assert torch.equal(HiddenStateEnsemble.from_pretrained(moved / "ensemble").generate(**inputs, **GREEDY), expected)
