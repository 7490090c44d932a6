"""The parameter average equals a model whose parameters were averaged, whatever the weights of each row."""

from copy import deepcopy

import pytest
import torch
from peft import PeftModel

from emorl.aggregation.ensemble import ParameterAverage
from emorl.policies.adapters import read_adapter

GREEDY = {"max_new_tokens": 12, "do_sample": False}
WEIGHTS = [0.6, 0.3, 0.5]


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma3_text", "gpt2", "gpt_neox", "phi"])
def policies(request, make_causal_model, write_adapter, tmp_path_factory):
    """(base, adapter directories, parameter average): policies of different rank, scaling and target modules."""
    base, directory = make_causal_model(request.param), tmp_path_factory.mktemp(request.param)
    few = {"gpt2": ["c_attn"], "gpt_neox": ["dense"]}.get(request.param, ["v_proj"])
    paths = [
        write_adapter(base, directory / "0", rank=2, seed=1),
        write_adapter(base, directory / "1", rank=5, alpha=6, rslora=True, seed=2),
        write_adapter(base, directory / "2", rank=3, target_modules=few, seed=3),
    ]
    return base, paths, ParameterAverage(base, {path.name: read_adapter(path) for path in paths}, weights=WEIGHTS)


@pytest.fixture(scope="module")
def inputs(tokenizer):
    return tokenizer(["hello", "how are you today", "a"], return_tensors="pt", padding=True)


def merged_by_peft(base, paths, weights):
    """The base plus the weighted sum of the deltas PEFT's own merge gives for each adapter alone."""
    average = deepcopy(base)
    for path, weight in zip(paths, weights, strict=True):
        merged = PeftModel.from_pretrained(deepcopy(base), str(path)).merge_and_unload()
        for target, after, before in zip(average.parameters(), merged.parameters(), base.parameters(), strict=True):
            target.data += weight * (after.data - before.data)
    return average


@torch.no_grad()
def test_it_equals_the_model_with_merged_weights(policies, inputs):
    base, paths, average = policies
    merged = merged_by_peft(base, paths, WEIGHTS)
    torch.testing.assert_close(average(**inputs).logits, merged(**inputs).logits, atol=5e-4, rtol=1e-4)
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        expected = merged.generate(**inputs, **GREEDY, **options)
        assert torch.equal(average.generate(**inputs, **GREEDY, **options), expected)


@pytest.mark.parametrize("policy", [0, 1, 2])
def test_one_hot_weights_are_that_policy_token_for_token(policies, inputs, policy):
    base, paths, average = policies
    peft = PeftModel.from_pretrained(deepcopy(base), str(paths[policy])).eval()
    weights = [float(index == policy) for index in range(3)]
    for options in (GREEDY, GREEDY | {"num_beams": 3}, {"max_new_tokens": 12, "do_sample": True}):
        torch.manual_seed(0)
        expected = peft.generate(**inputs, **options)
        torch.manual_seed(0)
        assert torch.equal(average.generate(**inputs, **options, weights=weights), expected)


def test_rows_may_have_weights_of_their_own(policies, inputs):
    _, _, average = policies
    rows = [[1.0, 0.0, 0.0], [0.2, 0.5, 0.3], [0.0, 0.0, 2.0]]
    options = GREEDY | {"num_beams": 2, "eos_token_id": None}
    together = average.generate(**inputs, **options, weights=rows)
    for index, weights in enumerate(rows):
        alone = {name: tensor[index : index + 1] for name, tensor in inputs.items()}
        assert torch.equal(average.generate(**alone, **options, weights=weights), together[index : index + 1])
