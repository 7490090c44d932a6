"""Weights by policy name: the same tokens as with numbers in policy order, wherever weights come in."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from emorl.aggregation.ensemble import HiddenStateEnsemble, ParameterAverage
from emorl.aggregation.trie import TrieDecoder
from emorl.config import UserError
from emorl.policies.adapters import Adapter, read_adapter

GREEDY = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture(scope="module")
def base(tiny_base_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_base_dir)


@pytest.fixture(scope="module")
def adapters(base, write_adapter, tmp_path_factory) -> dict[str, Adapter]:
    folder = tmp_path_factory.mktemp("policies")
    names = enumerate(["kind", "short"])
    return {name: read_adapter(write_adapter(base, folder / name, seed=seed)) for seed, name in names}


@pytest.fixture(scope="module")
def inputs(tokenizer):
    return tokenizer(["hello", "how are you"], return_tensors="pt", padding=True)


@pytest.fixture(scope="module", params=[HiddenStateEnsemble, ParameterAverage])
def mixture(request) -> type[HiddenStateEnsemble] | type[ParameterAverage]:
    return request.param


@torch.no_grad()
@pytest.mark.parametrize(
    ("named", "in_order"),
    [
        ({"short": 0.7, "kind": 0.3}, [0.3, 0.7]),
        ({"short": 1}, [0.0, 1.0]),  # what is not named counts 0
        ({"kind": 2.0, "short": 3.0}, [2.0, 3.0]),  # no sum is asked for
        ([{"kind": 0.3, "short": 0.7}, {"kind": 1}], [[0.3, 0.7], [1.0, 0.0]]),
        ([[0.3, 0.7], {"kind": 1}], [[0.3, 0.7], [1.0, 0.0]]),
    ],
)
def test_names_and_vectors_give_equal_tokens_and_logits(base, adapters, inputs, mixture, named, in_order):
    model = mixture(base, adapters)
    for options in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        expected = model.generate(**inputs, **GREEDY, **options, weights=in_order)
        assert torch.equal(model.generate(**inputs, **GREEDY, **options, weights=named), expected)
    assert torch.equal(model(**inputs, weights=named).logits, model(**inputs, weights=in_order).logits)
    if isinstance(named, dict):
        assert mixture(base, adapters, named).weights == tuple(in_order)
        model.weights = named
        assert model.weights == tuple(in_order)


def test_the_bare_base_goes_by_its_name_and_may_be_subtracted(base, adapters, inputs, mixture):
    model = mixture(base, adapters, {"kind": 1.5, "base": -0.5}, include_base=True)
    assert model.weights == (1.5, 0.0, -0.5)
    expected = base.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, weights={"base": 1}), expected)


def test_the_trie_takes_names(base, adapters, inputs, tokenizer):
    ensemble = HiddenStateEnsemble(base, adapters)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    trie = TrieDecoder(ensemble, inputs["input_ids"], inputs["attention_mask"], max_new_tokens=10, **ends)
    assert torch.equal(trie.decode([{"kind": 0.3, "short": 0.7}, {"short": 1}]), trie.decode([[0.3, 0.7], [0.0, 1.0]]))
    with pytest.raises(UserError, match="'shrt'"):
        trie.decode([{"kind": 1}, {"shrt": 1}])


@pytest.mark.parametrize("weights", [{"knd": 1.0}, [{"short": 1.0}, {"kind": 0.5, "knd": 0.5}]])
def test_an_unknown_name_is_refused_with_the_nearest_wherever_it_comes_in(base, adapters, inputs, mixture, weights):
    model, message = mixture(base, adapters), "weights name 'knd', which is no policy; did you mean 'kind'"
    with pytest.raises(UserError, match=message):
        model.generate(**inputs, **GREEDY, weights=weights)
    with pytest.raises(UserError, match=message):
        model(**inputs, weights=weights)
    with pytest.raises(UserError, match=message):
        model.weights = weights
    with pytest.raises(UserError, match=message):
        mixture(base, adapters, weights)


def test_names_without_weight_and_a_single_number_are_refused(base, adapters, inputs, mixture):
    model = mixture(base, adapters)
    for nothing in ({}, {"kind": 0.0}):
        with pytest.raises(ValueError, match="a row of zeros gives no policy any weight"):
            model.weights = nothing
    with pytest.raises(ValueError, match=r"weights of shape \(\); expected \(2,\)"):
        model.generate(**inputs, **GREEDY, weights=0.5)
