"""Encoder-decoders: each policy's own encoder states and caches, and the tokens of the slow computation.

A random T5 has no scale in its attention and amplifies roundings, those of another processor's kernels too. So identities are
proved in float64.
"""

from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from emorl.aggregation.ensemble import HiddenStateEnsemble, ParameterAverage
from emorl.policies.adapters import read_adapter

WEIGHTS = [0.5, 0.375, 0.125]  # exact in binary, as the scalings are: what is left are the kernels' own roundings
STEPS = 12
PROMPTS = ["hello", "how are you today", "a", "please tell me more"]
TARGETS = {"relu": ["q", "k", "v", "o", "wi", "wo"], "gated-gelu": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]}


@dataclass
class Case:
    """A base, three adapters on it, and each policy as PEFT loads it."""

    base: PreTrainedModel
    adapters: dict
    ensemble: HiddenStateEnsemble
    peft: list[PeftModel]


@pytest.fixture(scope="module", params=["relu", "gated-gelu"])
def case(request, make_seq2seq_model, write_adapter, tmp_path_factory) -> Case:
    """T5 ties head and embedding and scales before the head; T5 v1.1 is gated and does neither."""
    options = {"feed_forward_proj": request.param, "tie_word_embeddings": request.param == "relu", "initializer_factor": 2.0}
    base, directory = make_seq2seq_model(**options).double(), tmp_path_factory.mktemp(request.param)
    lora = {"task_type": "SEQ_2_SEQ_LM"}
    paths = [
        write_adapter(base, directory / "0", rank=2, seed=1, target_modules=TARGETS[request.param], **lora),
        write_adapter(base, directory / "1", rank=4, seed=2, target_modules=TARGETS[request.param], **lora),
        write_adapter(base, directory / "2", rank=8, seed=3, target_modules=["q", "wo"], **lora),
    ]
    adapters = {path.name: read_adapter(path) for path in paths}
    peft = [PeftModel.from_pretrained(deepcopy(base), str(path)).double().eval() for path in paths]
    return Case(base, adapters, HiddenStateEnsemble(base, adapters, weights=WEIGHTS).double(), peft)


@pytest.fixture(scope="module")
def inputs(tokenizer):
    return tokenizer(PROMPTS, return_tensors="pt", padding=True)


@torch.no_grad()
def slow_decode(case: Case, weights: list[float], inputs) -> torch.Tensor:
    """Policy by policy, encoder and whole prefix again at every step; what enters each head is averaged."""
    tokens = torch.zeros(len(PROMPTS), 1, dtype=torch.long)
    for _ in range(STEPS):
        mixed = torch.zeros(())
        for policy, weight in zip(case.peft, weights, strict=True):
            entering = []
            hook = policy.get_output_embeddings().register_forward_pre_hook(lambda _, args, into=entering: into.append(args[0]))
            policy(**inputs, decoder_input_ids=tokens, use_cache=False)
            hook.remove()
            mixed = mixed + weight * entering[0][:, -1]  # (B, H)
        chosen = case.base.get_output_embeddings()(mixed).argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, chosen], 1)
    return tokens


def test_greedy_tokens_equal_the_slow_reference_with_padding_and_early_end(case, inputs):
    slow = slow_decode(case, WEIGHTS, inputs)
    greedy = case.ensemble.generate(**inputs, max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
    assert torch.equal(greedy, slow)
    end = int(slow[3, 4])
    ended = case.ensemble.generate(**inputs, max_new_tokens=STEPS, do_sample=False, eos_token_id=end)
    assert (ended[3, 5:] == 0).all()
    assert torch.equal(ended[3, :5], slow[3, :5])


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2, "top_k": 20}],
    ids=["greedy", "beams", "sampling"],
)
@pytest.mark.parametrize("policy", [0, 2])
def test_one_hot_weights_are_that_policy_token_for_token(case, inputs, options, policy):
    options = {"max_new_tokens": STEPS, "do_sample": False} | options
    torch.manual_seed(0)
    expected = case.peft[policy].generate(**inputs, **options)
    torch.manual_seed(0)
    weights = [float(index == policy) for index in range(3)]
    assert torch.equal(case.ensemble.generate(**inputs, **options, weights=weights), expected)


def test_beam_search_with_a_cache_equals_beam_search_without(case, inputs):
    options = {"max_new_tokens": STEPS, "num_beams": 3, "num_return_sequences": 3, "do_sample": False}
    cached = case.ensemble.generate(**inputs, **options)
    assert torch.equal(cached, case.ensemble.generate(**inputs, **options, use_cache=False))


def test_batch_of_four_equals_four_batches_of_one(case, inputs, tokenizer):
    options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
    together = case.ensemble.generate(**inputs, **options)
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert torch.equal(case.ensemble.generate(**tokenizer(prompt, return_tensors="pt"), **options)[0], row)


def test_rows_may_have_weights_of_their_own(case, inputs):
    rows = [[1.0, 0.0, 0.0], [0.2, 0.5, 0.3], [0.0, 0.0, 2.0], [0.1, 0.1, 0.1]]
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None} | options
        together = case.ensemble.generate(**inputs, **options, weights=torch.tensor(rows))
        copies = options.get("num_return_sequences", 1)
        for index, weights in enumerate(rows):
            alone = {name: tensor[index : index + 1] for name, tensor in inputs.items()}
            expected = case.ensemble.generate(**alone, **options, weights=weights)
            assert torch.equal(together[index * copies : (index + 1) * copies], expected)


@torch.no_grad()
def test_the_parameter_average_is_the_sum_of_deltas(case, inputs):
    average = ParameterAverage(case.base, case.adapters, weights=WEIGHTS)
    merged = deepcopy(case.base)
    for weight, adapter in zip(WEIGHTS, case.adapters.values(), strict=True):
        for name, (a, b) in adapter.factors.items():
            merged.get_submodule(name).weight += weight * (a @ b).T
    for options in ({}, {"num_beams": 2}):
        expected = merged.generate(**inputs, max_new_tokens=STEPS, do_sample=False, **options)
        assert torch.equal(average.generate(**inputs, max_new_tokens=STEPS, do_sample=False, **options), expected)


@torch.no_grad()
def test_loss_is_that_of_the_averaged_logits(case, inputs):
    labels = torch.randint(5, 261, (4, 6), generator=torch.Generator().manual_seed(0))
    output = case.ensemble(**inputs, labels=labels)
    logits = sum(w * policy(**inputs, labels=labels).logits for w, policy in zip(WEIGHTS, case.peft, strict=True))
    torch.testing.assert_close(output.logits, logits, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    single = deepcopy(case.ensemble).float()(**inputs, labels=labels).logits
    assert (single.double() - logits).abs().max() < 0.02 * logits.std()  # float32, of kernels that nobody chose


def test_saved_and_loaded_it_gives_the_same_tokens(case, inputs, tmp_path):
    case.base.save_pretrained(tmp_path / "base")
    base = type(case.base).from_pretrained(tmp_path / "base")
    ensemble = HiddenStateEnsemble(base, case.adapters, weights=WEIGHTS)
    ensemble.save_pretrained(tmp_path / "saved")
    loaded = HiddenStateEnsemble.from_pretrained(tmp_path / "saved")
    options = {"max_new_tokens": STEPS, "do_sample": False}
    assert torch.equal(loaded.generate(**inputs, **options), case.ensemble.generate(**inputs, **options))
