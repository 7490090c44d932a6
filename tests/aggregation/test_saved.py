"""An ensemble in a folder that can be copied alone: the same tokens as before."""

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from emorl.aggregation.ensemble import HiddenStateEnsemble, ParameterAverage
from emorl.config import UserError
from emorl.policies.adapters import Adapter, base_fingerprint, read_adapter

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
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert loaded.tokenizer.padding_side == "left"
    loaded.save_pretrained(tmp_path / "again")
    again = mixture.from_pretrained(tmp_path / "again")
    assert torch.equal(again.generate(**inputs, **GREEDY), expected["saved"])
    assert again.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_adapters_are_copied_bit_for_bit_and_keep_their_scales(base, adapters, inputs, mixture, tmp_path):
    sources = {name: adapter.path for name, adapter in adapters.items()}
    (sources["kind"] / "policy.json").write_text(json.dumps({"base_fingerprint": base_fingerprint(base)}))
    model = mixture(base, {"short": read_adapter(sources["short"], 1.5), "kind": read_adapter(sources["kind"])})
    model.save_pretrained(tmp_path / "saved")
    for name, source in sources.items():
        for file in ("adapter_config.json", "adapter_model.safetensors", *(["policy.json"] if name == "kind" else [])):
            assert (tmp_path / "saved" / "adapters" / name / file).read_bytes() == (source / file).read_bytes()
    loaded = mixture.from_pretrained(tmp_path / "saved", base=base)
    assert loaded.tokenizer is None
    assert (loaded.policy_names, loaded.adapter_scales) == (("short", "kind"), {"short": 1.5, "kind": 1.0})
    assert torch.equal(loaded.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


def test_a_preference_chooses_another_point_of_the_front(base, adapters, tmp_path):
    ensemble = HiddenStateEnsemble(base, adapters, FRONT[1]["weights"])
    ensemble.save_pretrained(tmp_path / "ensemble", front=FRONT)
    load = HiddenStateEnsemble.from_pretrained
    assert load(tmp_path / "ensemble").weights == (0.2, 0.8)
    assert load(tmp_path / "ensemble", prefer={"empathy": 0.7, "brevity": 0.3}).weights == (0.9, 0.1)
    assert load(tmp_path / "ensemble", weights={"short": 2}).weights == (0.0, 2.0)
    with pytest.raises(UserError, match="preferences name empathie; did you mean 'empathy'"):
        load(tmp_path / "ensemble", prefer={"empathie": 1})
    with pytest.raises(UserError, match="prefer= chooses the weights and weights= gives them"):
        load(tmp_path / "ensemble", prefer={"empathy": 1}, weights=[0.5, 0.5])
    ensemble.save_pretrained(tmp_path / "ensemble")
    with pytest.raises(UserError, match="saved without a front"):
        load(tmp_path / "ensemble", prefer={"empathy": 1})


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
    with pytest.raises(
        UserError, match=r"the base model in .*nowhere or /nowhere, which has gone; put it back, or give it as base"
    ):
        mixture.from_pretrained(saved)
    file.write_text(json.dumps(settings))
    shutil.rmtree(saved / "adapters" / "short")
    with pytest.raises(UserError, match=r"adapters/short is not a directory"):
        mixture.from_pretrained(saved)


def test_a_base_made_in_memory_is_named_by_its_fingerprint(make_causal_model, adapters, mixture, inputs, tmp_path):
    base = make_causal_model("llama")
    model = mixture(base, adapters, [0.5, 0.5])
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="without a folder or hub id, as if made in memory; give it as base="):
        mixture.from_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="saved over another base than the one given"):
        mixture.from_pretrained(tmp_path / "saved", base=make_causal_model("llama", seed=5))
    loaded = mixture.from_pretrained(tmp_path / "saved", base=base)
    assert torch.equal(loaded.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


def test_a_base_that_is_nowhere_is_named_with_the_remedy(base, adapters, inputs, tmp_path):
    shutil.copytree(base.name_or_path, tmp_path / "base")
    model = HiddenStateEnsemble(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapters)
    model.save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "deeper" / "copy")  # the relative path leads nowhere, the absolute one does
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(HiddenStateEnsemble.from_pretrained(tmp_path / "deeper" / "copy").generate(**inputs, **GREEDY), expected)
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "pytorch_model.bin")  # no pickle is read
    with pytest.raises(UserError, match=r"/saved: base.model .* fetch or save its files anew.*; or give it as base=$"):
        HiddenStateEnsemble.from_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "base")
    model.save_pretrained(tmp_path / "later")  # a folder that has gone is no hub id
    assert json.loads((tmp_path / "later" / "ensemble.json").read_text())["base"] is None
    loaded = HiddenStateEnsemble.from_pretrained(tmp_path / "later", base=base)
    assert torch.equal(loaded.generate(**inputs, **GREEDY), expected)
    with pytest.raises(UserError, match="base= is loaded already, so dtype cannot change it"):
        HiddenStateEnsemble.from_pretrained(tmp_path / "later", base=base, dtype=torch.float16)
    file = tmp_path / "later" / "ensemble.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base": {"hub": "nobody/nothing"}}))
    with pytest.raises(UserError, match=r"/later: base.model 'nobody/nothing': neither .*; or give it as base=$"):
        HiddenStateEnsemble.from_pretrained(tmp_path / "later")


def test_how_the_base_is_loaded_can_be_said(base, adapters, inputs, tmp_path):
    HiddenStateEnsemble(base, adapters).save_pretrained(tmp_path / "saved")
    options = {"attn_implementation": "eager", "dtype": torch.bfloat16, "device_map": {"": "cpu"}, "trust_remote_code": True}
    loaded = HiddenStateEnsemble.from_pretrained(tmp_path / "saved", **options)
    assert (loaded.dtype, loaded.config._attn_implementation) == (torch.bfloat16, "eager")
    with pytest.raises(UserError, match=r"saved: base\.model .*nope.*; or give it as base=$"):
        HiddenStateEnsemble.from_pretrained(tmp_path / "saved", attn_implementation="nope")


def test_an_interrupted_save_leaves_a_whole_ensemble(base, adapters, tmp_path, monkeypatch):
    saved, ensemble = tmp_path / "saved", HiddenStateEnsemble(base, adapters, [0.9, 0.1])
    ensemble.save_pretrained(saved)
    in_memory = HiddenStateEnsemble(base, {"kind": adapters["kind"], "short": replace(adapters["short"], path=tmp_path / "no")})
    with pytest.raises(UserError, match=r"no adapter of policy 'short' lies in .*no; write it there"):
        in_memory.save_pretrained(saved)
    assert HiddenStateEnsemble.from_pretrained(saved).weights == (0.9, 0.1)

    def killed(folder: Path, **_) -> None:
        if (folder / "ensemble.json").is_file():  # a file is removed, then the process is killed
            (folder / "ensemble.json").unlink()
            raise KeyboardInterrupt

    ensemble.weights = [0.2, 0.8]
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            ensemble.save_pretrained(saved)
    assert HiddenStateEnsemble.from_pretrained(saved).weights == (0.2, 0.8)
    ensemble.save_pretrained(saved)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


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
