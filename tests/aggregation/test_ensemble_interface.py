"""What surrounds decoding: the base stays untouched, the bare base as a policy, saving and loading, and every
refusal."""

from copy import deepcopy

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from emorl.aggregation.ensemble import HiddenStateEnsemble, ParameterAverage
from emorl.policies.adapters import Adapter, read_adapter

GREEDY = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture(scope="module")
def base(tiny_base_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_base_dir)


@pytest.fixture
def adapters(base, write_adapter, tmp_path) -> dict[str, Adapter]:
    paths = [write_adapter(base, tmp_path / name, seed=seed) for seed, name in enumerate(["kind", "short"])]
    return {path.name: read_adapter(path) for path in paths}


@pytest.fixture(scope="module")
def inputs(tokenizer):
    return tokenizer(["hello", "how are you"], return_tensors="pt", padding=True)


@pytest.fixture(params=[HiddenStateEnsemble, ParameterAverage])
def mixture(request) -> type[HiddenStateEnsemble] | type[ParameterAverage]:
    return request.param


@torch.no_grad()
def test_the_base_given_stays_as_it_was_and_shares_its_parameters(base, adapters, inputs, mixture):
    parameters, trainable = dict(base.named_parameters()), [p.requires_grad for p in base.parameters()]
    modules, values = [name for name, _ in base.named_modules()], deepcopy(base.state_dict())
    expected = base(**inputs).logits
    model = mixture(base, adapters)
    model.generate(**inputs, **GREEDY, num_beams=2)
    assert [name for name, _ in base.named_modules()] == modules
    assert [p.requires_grad for p in base.parameters()] == trainable
    assert all(torch.equal(tensor, values[name]) for name, tensor in base.state_dict().items())
    assert torch.equal(base(**inputs).logits, expected)
    own = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in own for parameter in parameters.values())


def test_the_generation_settings_of_the_base_are_taken_over_as_a_copy(tiny_base_dir, adapters, inputs, mixture):
    base = AutoModelForCausalLM.from_pretrained(tiny_base_dir)
    base.generation_config.update(max_new_tokens=3, eos_token_id=None)
    model = mixture(base, adapters)
    base.generation_config.max_new_tokens = 5
    assert model.generate(**inputs).shape[1] == inputs["input_ids"].shape[1] + 3


@torch.no_grad()
def test_the_bare_base_as_last_policy_allows_extrapolation(base, adapters, inputs):
    model = HiddenStateEnsemble(base, adapters, include_base=True)
    assert model.policy_names == ("kind", "short", "base")
    assert torch.equal(model.generate(**inputs, **GREEDY, weights=[0, 0, 1]), base.generate(**inputs, **GREEDY))
    peft = PeftModel.from_pretrained(deepcopy(base), str(adapters["kind"].path)).eval()
    expected = 1.5 * peft(**inputs).logits - 0.5 * base(**inputs).logits
    torch.testing.assert_close(model(**inputs, weights=[1.5, 0, -0.5]).logits, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5], r"weights of shape \(1,\); expected \(2,\), one for each policy of \['kind', 'short'\], or \(2, 2\)"),
        ([0.5, 0.2, 0.3], r"weights of shape \(3,\)"),
        ([[0.5, 0.5]] * 3, r"weights of shape \(3, 2\)"),
        ([0.5, float("nan")], "expected finite numbers"),
        ([0.5, float("inf")], "expected finite numbers"),
        ([0.0, 0.0], "a row of zeros gives no policy any weight"),
        ([[1.0, 0.0], [0.0, 0.0]], "a row of zeros"),
        ([1.5, -0.5], "expected at least 0: to subtract, set include_base=True"),
    ],
)
def test_wrong_weights_are_refused_wherever_they_come_in(base, adapters, inputs, mixture, weights, message):
    model = mixture(base, adapters)
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, **GREEDY, weights=weights)
    with pytest.raises(ValueError, match=message):
        model(**inputs, weights=weights)
    if not isinstance(weights[0], list):
        message = message.replace("(2, 2)", "(1, 2)").replace(r"\(2, 2\)", r"\(1, 2\)")
        with pytest.raises(ValueError, match=message):
            model.weights = weights
        with pytest.raises(ValueError, match=message):
            mixture(base, adapters, weights)
    assert model.weights == (0.5, 0.5)


def test_what_cannot_be_combined_exactly_is_refused(
    base, adapters, mixture, make_causal_model, make_seq2seq_model, write_adapter, tmp_path
):
    with pytest.raises(ValueError, match="No adapters given; expected at least one policy"):
        mixture(base, {})
    with pytest.raises(ValueError, match=r"A policy is named 'base'.*rename it"):
        mixture(base, {"base": adapters["kind"]}, include_base=True)
    with pytest.raises(ValueError, match="which T5ForConditionalGeneration does not have; use the base it was trained on"):
        mixture(make_seq2seq_model(), adapters)
    with pytest.raises(ValueError, match=r"PeftModelForCausalLM cannot be combined .* without adapters"):
        mixture(PeftModel.from_pretrained(deepcopy(base), str(adapters["kind"].path)), adapters)
    with pytest.raises(ValueError, match="which GPT2LMHeadModel does not have"):
        mixture(make_causal_model("gpt2"), adapters)
    wide = make_causal_model("llama", hidden_size=64)
    with pytest.raises(ValueError, match=r"features at 'model.layers.0.*', but the base has 48 to 64"):
        mixture(wide, adapters)


def test_capped_logits_are_refused_only_for_hidden_states(make_causal_model, write_adapter, inputs, tmp_path):
    base = make_causal_model("gemma2")
    adapters = {"one": read_adapter(write_adapter(base, tmp_path))}
    with pytest.raises(ValueError, match=r"caps its logits \(final_logit_softcapping=30.0\).*use ParameterAverage"):
        HiddenStateEnsemble(base, adapters)
    peft = PeftModel.from_pretrained(deepcopy(base), str(tmp_path)).eval()
    expected = peft.generate(**inputs, **GREEDY)
    assert torch.equal(ParameterAverage(base, adapters).generate(**inputs, **GREEDY), expected)


def test_a_missing_input_is_refused(base, adapters, mixture):
    with pytest.raises(ValueError, match="Neither input_ids nor inputs_embeds given"):
        mixture(base, adapters)(attention_mask=torch.ones(1, 2))
