"""Concatenated adapters are an ordinary PEFT adapter, and exactly the weighted sum of what went in."""

import json
from copy import deepcopy

import pytest
import torch
from peft import PeftModel

from emorl.aggregation.ensemble import ParameterAverage
from emorl.fusion.adapters import concatenate_adapters
from emorl.policies.adapters import check_adapter_fits, read_adapter

WEIGHTS = [0.7, -0.4, 1.3]


@pytest.fixture(params=["llama", "gpt2"])
def base_and_adapters(request, make_causal_model, write_adapter, tmp_path):
    """Three adapters of different rank, scaling and target modules, so that some modules have 1, some 2, some 3 of
    them."""
    base = make_causal_model(request.param)
    some, few = (["c_attn", "c_fc"], ["c_attn"]) if request.param == "gpt2" else (["q_proj", "up_proj"], ["q_proj"])
    paths = [
        write_adapter(base, tmp_path / "all", rank=2, seed=1),
        write_adapter(
            base, tmp_path / "some", rank=5, alpha=3, rslora=True, target_modules=some, seed=2, layers_to_transform=[1]
        ),
        write_adapter(base, tmp_path / "few", rank=3, alpha=6, target_modules=few, seed=3),
    ]
    return base, [read_adapter(path) for path in paths]


@torch.no_grad()
def test_fused_adapter_equals_parameter_average_and_dense_sum(base_and_adapters, tokenizer, tmp_path):
    base, adapters = base_and_adapters
    fused = concatenate_adapters(adapters, WEIGHTS, tmp_path / "fused")
    inputs = tokenizer(["a prompt", "another one"], return_tensors="pt", padding=True)
    loaded = PeftModel.from_pretrained(deepcopy(base), str(fused)).eval()
    found = loaded(**inputs).logits

    named = {adapter.path.name: adapter for adapter in adapters}
    average = ParameterAverage(base, named, include_base=True, weights=[*WEIGHTS, 0.0])
    torch.testing.assert_close(average(**inputs).logits, found, atol=2e-4, rtol=1e-4)

    dense = deepcopy(base)
    for adapter, weight in zip(adapters, WEIGHTS, strict=True):
        for name, (a, b) in adapter.factors.items():
            delta = weight * (a @ b)  # (in, out)
            matrix = dense.get_submodule(name).weight.data
            matrix += delta if adapter.fan_in_fan_out else delta.T
    torch.testing.assert_close(dense(**inputs).logits, found, atol=2e-4, rtol=1e-4)


def test_one_adapter_of_weight_one_comes_back_unchanged(base_and_adapters, tmp_path):
    base, (adapter, *_) = base_and_adapters
    again = read_adapter(concatenate_adapters([adapter], [1.0], tmp_path / "fused"))
    check_adapter_fits(again, base)
    assert again.factors.keys() == adapter.factors.keys()
    for name, factors in adapter.factors.items():
        assert all(torch.equal(before, after) for before, after in zip(factors, again.factors[name], strict=True))
    assert again.fan_in_fan_out == adapter.fan_in_fan_out


def test_ranks_add_up_and_scaling_is_one(base_and_adapters, tmp_path):
    _, adapters = base_and_adapters
    fused = concatenate_adapters(adapters, WEIGHTS, tmp_path / "fused")
    config = json.loads((fused / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert set(config["rank_pattern"].values()) == {5, 7, 10}
    assert not config["use_rslora"]


def test_the_common_base_is_recorded_and_different_bases_are_refused(base_and_adapters, tmp_path):
    _, (first, second, _) = base_and_adapters
    for adapter in (first, second):
        (adapter.path / "policy.json").write_text(json.dumps({"base_fingerprint": "one"}))
    both = [read_adapter(first.path), read_adapter(second.path)]
    assert read_adapter(concatenate_adapters(both, [1, 1], tmp_path / "fused")).base_fingerprint == "one"
    (second.path / "policy.json").write_text(json.dumps({"base_fingerprint": "two"}))
    with pytest.raises(ValueError, match="were trained on different bases; fuse adapters of one base"):
        concatenate_adapters([both[0], read_adapter(second.path)], [1, 1], tmp_path / "refused")


def test_wrong_weights_and_shapes_are_refused(base_and_adapters, make_causal_model, write_adapter, tmp_path):
    base, adapters = base_and_adapters
    with pytest.raises(ValueError, match="3 adapters and 2 weights; expected one weight per"):
        concatenate_adapters(adapters, [1, 2], tmp_path / "out")
    with pytest.raises(ValueError, match=r"Got weights \[1, 2, nan\]; expected finite"):
        concatenate_adapters(adapters, [1, 2, float("nan")], tmp_path / "out")
    wider = {"n_inner": 64} if base.config.model_type == "gpt2" else {"intermediate_size": 64}
    other = read_adapter(write_adapter(make_causal_model(base.config.model_type, **wider), tmp_path / "wide"))
    with pytest.raises(ValueError, match="map different shapes"):
        concatenate_adapters([adapters[0], other], [1, 1], tmp_path / "out")
