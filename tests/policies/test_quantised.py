"""A base in few bits: policies are trained on it, and all weight on one policy is that policy as PEFT runs it."""

import dataclasses
import json

import pytest
import torch
from peft import PeftModel

from emorl.aggregation.ensemble import HiddenStateEnsemble, ParameterAverage
from emorl.aggregation.trie import TrieDecoder
from emorl.config import UserError
from emorl.config.base import QuantizationConfig
from emorl.config.experiment import BaseConfig, DataConfig, Experiment, ObjectiveConfig, TrainConfig
from emorl.config.train import CollapseConfig
from emorl.fusion.loaded import loaded_adapters
from emorl.policies.adapters import base_fingerprint, read_adapter
from emorl.policies.base import load_base, quantization_of, read_policies
from tests.training.trained import policy_folders, train

pytest.importorskip("bitsandbytes", reason="the extra quantised")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL 1.16 and bitsandbytes use names that others have renamed
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
GREEDY = {"max_new_tokens": 6, "do_sample": False}
SIZES = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "num_key_value_heads": 4}  # a CPU wants multiples of 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_causal_model, tokenizer):
    place = tmp_path_factory.mktemp("base")
    make_causal_model("llama", **SIZES).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(params=[4, 8])
def config(request, folder):
    return BaseConfig(model=str(folder), quantization=QuantizationConfig(bits=request.param))


@pytest.fixture(scope="module")
def paths(folder, write_adapter, tmp_path_factory):
    base = load_base(BaseConfig(model=str(folder))).model
    return {name: write_adapter(base, tmp_path_factory.mktemp("adapter"), seed=seed) for seed, name in enumerate("ab")}


@pytest.fixture(scope="module")
def inputs(tokenizer):
    return tokenizer(["say yes", "no", "a longer prompt"], return_tensors="pt", padding=True)


def variety(prompts, completions, **columns):
    """Share of distinct characters."""
    return [len(set(text)) / max(1, len(text)) for text in (completion[0]["content"] for completion in completions)]


def adapters(paths):
    return {name: read_adapter(path) for name, path in paths.items()}


@torch.no_grad()
def test_all_weight_on_one_policy_is_that_policy_as_peft_runs_it_on_the_same_base(config, paths, inputs):
    base = load_base(config).model
    alone = base(**inputs).logits
    for mixture in (HiddenStateEnsemble, ParameterAverage):
        policies = mixture(base, adapters(paths))
        for index, (name, path) in enumerate(paths.items()):
            peft: PeftModel = PeftModel.from_pretrained(load_base(config).model, str(path)).eval()
            # 8 bits: which columns count as outliers depends on all rows of a product, so both have the same rows
            assert torch.equal(policies(**inputs, weights={name: 1.0}, active=(index,)).logits, peft(**inputs).logits)
            answers = peft.generate(**inputs, **GREEDY)
            assert torch.equal(policies.generate(**inputs, **GREEDY, weights={name: 1.0}), answers)
    assert torch.equal(base(**inputs).logits, alone)  # which is left as it was


@torch.no_grad()
def test_the_trie_gives_the_ensembles_tokens(folder, paths, inputs):
    config = BaseConfig(model=str(folder), quantization=QuantizationConfig(bits=4))
    ensemble = HiddenStateEnsemble(load_base(config).model, adapters(paths))
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.25, 0.75]])
    tokens = TrieDecoder(ensemble, **inputs, max_new_tokens=6).decode(weights)
    length = inputs["input_ids"].shape[1]
    for row, found in zip(weights, tokens, strict=True):
        assert torch.equal(ensemble.generate(**inputs, **GREEDY, weights=row, eos_token_id=None)[:, length:], found)


@torch.no_grad()
def test_the_bits_are_those_asked_for_and_the_base_is_known_again(config, folder, inputs):
    base = load_base(config).model
    assert quantization_of(base) == dataclasses.asdict(config.quantization)
    assert base.model.layers[0].mlp.up_proj.weight.dtype == {4: torch.uint8, 8: torch.int8}[config.quantization.bits]
    fingerprint = base_fingerprint(base)
    base(**inputs)  # an 8-bit layer moves its numbers, and a 4-bit one packs them for a CPU
    assert base_fingerprint(base) == base_fingerprint(load_base(config).model) == fingerprint
    assert fingerprint != base_fingerprint(load_base(BaseConfig(model=str(folder))).model)


@torch.no_grad()
def test_a_saved_ensemble_loads_its_base_in_the_same_bits(config, paths, inputs, tmp_path):
    ensemble = HiddenStateEnsemble(load_base(config).model, adapters(paths), [0.75, 0.5])
    expected = ensemble.generate(**inputs, **GREEDY)
    ensemble.save_pretrained(tmp_path / "saved")
    loaded = HiddenStateEnsemble.from_pretrained(tmp_path / "saved")
    assert quantization_of(loaded.policies) == quantization_of(ensemble.policies)
    assert torch.equal(loaded.generate(**inputs, **GREEDY), expected)


def test_a_policy_is_trained_on_it_and_is_an_ordinary_adapter(config, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {word} {i}"}) + "\n" for i in range(8) for word in ("yes", "no")))
    experiment = Experiment(
        output=tmp_path / "run",
        base=config,
        data=DataConfig(path=str(data), validation=2, test=2),
        objectives={"letters": ObjectiveConfig(function=f"{__name__}:variety")},
        generation={"max_new_tokens": 8, "do_sample": False},
        train=TrainConfig(
            lora={"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
            grpo={"max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4, "eval_steps": 1},
            collapse=CollapseConfig(share=0.0),
        ),
    )
    log = json.loads((train(experiment, "letters") / "result.json").read_text())["log"]
    assert any(entry.get("grad_norm", 0) > 0 for entry in log)
    base = load_base(config)
    [policy] = read_policies(policy_folders(experiment), base).values()
    assert HiddenStateEnsemble(base.model, {"short": policy})  # which checks that it belongs to this base


def test_a_search_of_fusions_refuses_it(config, paths):
    with pytest.raises(UserError, match=r"base\.quantization: a search of fusions changes the base's own parameters"):
        loaded_adapters(load_base(config).model, list(adapters(paths).values()))


def test_without_the_extra_it_is_one_line(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"base.quantization needs bitsandbytes: pip install 'emorl\[quantised\]'"):
        load_base(config)
