"""Every family: the ensemble's tokens are those of the slow computation, and of PEFT when one policy has all the
weight."""

from copy import deepcopy
from dataclasses import dataclass
from threading import Thread

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel, TextIteratorStreamer, TextStreamer

from emorl.aggregation.ensemble import HiddenStateEnsemble, ParameterAverage
from emorl.aggregation.stacked_lora import policy_rows
from emorl.policies.adapters import read_adapter

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3_text", "gpt2", "gpt_neox", "phi"]
FEW_MODULES = {"gpt2": ["c_attn"], "gpt_neox": ["dense"]}
WEIGHTS = [0.5, 0.3, 0.2]
STEPS = 12  # beyond the sliding window of 8
PROMPTS = ["hello", "how are you today", "a", "please tell me more"]


@dataclass
class Case:
    """A base, an ensemble of three policies on it, and each policy as PEFT loads it."""

    base: PreTrainedModel
    ensemble: HiddenStateEnsemble
    peft: list[PeftModel]


@pytest.fixture(scope="module")
def make_case(make_causal_model, write_adapter, tmp_path_factory):
    """Three policies of different rank and scaling, the last on other modules than the first two."""
    made: dict[str, Case] = {}

    def make(family: str) -> Case:
        if family not in made:
            base, directory = make_causal_model(family), tmp_path_factory.mktemp(family)
            few = FEW_MODULES.get(family, ["v_proj"])
            paths = [
                write_adapter(base, directory / "0", rank=2, seed=1),
                write_adapter(base, directory / "1", rank=5, alpha=6, rslora=True, seed=2),
                write_adapter(base, directory / "2", rank=3, seed=3, target_modules=few),
            ]
            ensemble = HiddenStateEnsemble(base, {path.name: read_adapter(path) for path in paths}, weights=WEIGHTS)
            peft = [PeftModel.from_pretrained(deepcopy(base), str(path)).eval() for path in paths]
            made[family] = Case(base, ensemble, peft)
        return made[family]

    return make


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, make_case) -> Case:
    return make_case(request.param)


@pytest.fixture(scope="module")
def llama(make_case) -> Case:
    return make_case("llama")


@pytest.fixture(scope="module")
def inputs(tokenizer):
    return tokenizer(PROMPTS, return_tensors="pt", padding=True)


def one_hot(policy: int) -> list[float]:
    return [float(index == policy) for index in range(3)]


@torch.no_grad()
def slow_decode(case: Case, weights: list[float], inputs) -> torch.Tensor:
    """Policy by policy, the full prefix again at every step, no cache; what enters each policy's own head is
    averaged."""
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(STEPS):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        mixed = torch.zeros(())
        for policy, weight in zip(case.peft, weights, strict=True):
            entering = []
            head = policy.get_output_embeddings()
            hook = head.register_forward_pre_hook(lambda _, args, into=entering: into.append(args[0]))
            policy(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
            hook.remove()
            mixed = mixed + weight * entering[0][:, -1]  # (B, H)
        chosen = case.base.get_output_embeddings()(mixed).argmax(-1, keepdim=True)
        tokens, mask = torch.cat([tokens, chosen], 1), torch.cat([mask, torch.ones_like(chosen)], 1)
    return tokens


def stopped_at(tokens: torch.Tensor, prompt_length: int, eos: int) -> torch.Tensor:
    """What greedy decoding gives when `eos` ends a sequence: padding after it, cut when all have ended."""
    tokens = tokens.clone()
    for row in tokens[:, prompt_length:]:
        ends = (row == eos).nonzero()
        if len(ends):
            row[ends[0, 0] + 1 :] = 0
    longest = (tokens != 0).any(0).nonzero().max() + 1
    return tokens[:, :longest]


def test_greedy_tokens_equal_the_slow_reference_with_padding_and_early_end(case, inputs):
    slow = slow_decode(case, WEIGHTS, inputs)
    length = inputs["input_ids"].shape[1]
    greedy = case.ensemble.generate(**inputs, max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
    assert torch.equal(greedy, slow)
    eos = int(slow[1, length + 3])
    ended = case.ensemble.generate(**inputs, max_new_tokens=STEPS, do_sample=False, eos_token_id=eos)
    expected = stopped_at(slow, length, eos)
    assert (expected[1, length + 4 :] == 0).all()
    assert torch.equal(ended, expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 20},
        {"cache_implementation": "static"},
    ],
    ids=["greedy", "beams", "sampling", "static"],
)
@pytest.mark.parametrize("policy", [0, 2])
def test_one_hot_weights_are_that_policy_token_for_token(case, inputs, options, policy):
    options = {"max_new_tokens": STEPS, "do_sample": False} | options
    torch.manual_seed(0)
    expected = case.peft[policy].generate(**inputs, **options)
    torch.manual_seed(0)
    assert torch.equal(case.ensemble.generate(**inputs, **options, weights=one_hot(policy)), expected)


def test_policies_without_weight_are_not_computed(case, inputs):
    options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    for weights, computed in (([0, 1, 0], 1), ([0.5, 0, 0.5], 2), ([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]], 3)):
        output = case.ensemble.generate(**inputs, **options, weights=weights)
        assert output.past_key_values.layers[0].keys.shape[0] == computed * len(PROMPTS)
    two = case.ensemble.generate(**inputs, **options, weights=[0.5, 0, 0.5]).sequences
    assert torch.equal(two, slow_decode(case, [0.5, 0.0, 0.5], inputs))


def test_the_head_sees_only_the_last_token_of_a_prompt(case, inputs):
    seen = []
    head = case.ensemble.policies.get_output_embeddings().head
    with head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1])):
        case.ensemble.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert seen == [1, 1, 1]


def test_hidden_state_average_equals_weighted_logit_average(case, inputs):
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    call = {**inputs, "position_ids": positions, "logits_to_keep": 2}
    with torch.no_grad():
        logits = [policy(**call).logits for policy in case.peft]
        found = case.ensemble(**call, weights=WEIGHTS).logits
    assert found.shape[:2] == (len(PROMPTS), 2)
    expected = sum(weight * one for weight, one in zip(WEIGHTS, logits, strict=True))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_beam_search_with_a_cache_equals_beam_search_without(case, inputs):
    options = {"max_new_tokens": STEPS, "num_beams": 3, "num_return_sequences": 3, "do_sample": False}
    cached = case.ensemble.generate(**inputs, **options)
    assert torch.equal(cached, case.ensemble.generate(**inputs, **options, use_cache=False))


def test_batch_of_four_equals_four_batches_of_one(case, inputs, tokenizer):
    length = inputs["input_ids"].shape[1]
    together = case.ensemble.generate(**inputs, max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
    for prompt, row in zip(PROMPTS, together, strict=True):
        alone = tokenizer(prompt, return_tensors="pt")
        tokens = case.ensemble.generate(**alone, max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
        assert torch.equal(tokens[0, alone["input_ids"].shape[1] :], row[length:])


def test_rows_may_have_weights_of_their_own(llama, inputs):
    rows = [[1.0, 0.0, 0.0], [0.2, 0.5, 0.3], [0.0, 0.0, 2.0], [0.1, 0.1, 0.1]]
    for options in (
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    ):
        options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None} | options
        together = llama.ensemble.generate(**inputs, **options, weights=torch.tensor(rows))
        copies = options.get("num_return_sequences", 1)
        for index, weights in enumerate(rows):
            alone = {name: tensor[index : index + 1] for name, tensor in inputs.items()}
            expected = llama.ensemble.generate(**alone, **options, weights=weights)
            assert torch.equal(together[index * copies : (index + 1) * copies], expected)


def test_only_the_direction_of_weights_matters_for_greedy_and_the_default_is_their_own(llama, inputs):
    options = {"max_new_tokens": STEPS, "do_sample": False}
    default = llama.ensemble.generate(**inputs, **options)
    assert torch.equal(default, llama.ensemble.generate(**inputs, **options, weights=[5.0, 3.0, 2.0]))
    assert not torch.equal(default, llama.ensemble.generate(**inputs, **options, weights=one_hot(1)))


def test_equal_policies_reproduce_either(llama, inputs):
    adapter = read_adapter(llama.ensemble.adapter_paths["1"])
    twins = HiddenStateEnsemble(llama.base, {"left": adapter, "right": adapter})
    options = {"max_new_tokens": STEPS, "do_sample": False}
    expected = llama.peft[1].generate(**inputs, **options)
    for weights in ([0.5, 0.5], [0.25, 0.75]):
        assert torch.equal(twins.generate(**inputs, **options, weights=weights), expected)


def test_drafts_of_the_parameter_average_change_no_token(llama, tokenizer):
    prompt = tokenizer("hello", return_tensors="pt")
    options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "weights": WEIGHTS}
    adapters = {name: read_adapter(path) for name, path in llama.ensemble.adapter_paths.items()}
    average = ParameterAverage(llama.base, adapters)
    expected = llama.ensemble.generate(**prompt, **options)
    assert torch.equal(llama.ensemble.generate(**prompt, **options, assistant_model=average), expected)


def test_streaming_yields_the_same_text(llama, tokenizer, capsys):
    prompt = tokenizer("hello", return_tensors="pt")
    options = {"max_new_tokens": STEPS, "do_sample": False}
    text = tokenizer.decode(llama.ensemble.generate(**prompt, **options)[0, prompt["input_ids"].shape[1] :])
    llama.ensemble.generate(**prompt, **options, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip("\n") == text
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = Thread(target=llama.ensemble.generate, kwargs={**prompt, **options, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == text
    thread.join()


def test_threads_do_not_mix_up_their_weights(llama, inputs):
    options = {"max_new_tokens": STEPS, "do_sample": False}
    found: dict[int, torch.Tensor] = {}

    def decode(policy: int) -> None:
        found[policy] = llama.ensemble.generate(**inputs, **options, weights=one_hot(policy))

    threads = [Thread(target=decode, args=(policy,)) for policy in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for policy, peft in enumerate(llama.peft):
        assert torch.equal(found[policy], peft.generate(**inputs, **options))


def test_generation_continues_from_a_returned_cache(llama, inputs):
    options = {"do_sample": False, "eos_token_id": None}
    whole = llama.ensemble.generate(**inputs, **options, max_new_tokens=STEPS)
    first = llama.ensemble.generate(**inputs, **options, max_new_tokens=5, return_dict_in_generate=True)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
    continued = llama.ensemble.generate(
        first.sequences, attention_mask=mask, past_key_values=first.past_key_values, **options, max_new_tokens=STEPS - 5
    )
    assert torch.equal(continued, whole)


def test_policy_rows_selects_sequences_from_the_cache(llama, inputs):
    ensemble, kept = llama.ensemble, torch.tensor([3, 1])
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    step = torch.tensor([[40], [41], [42], [43]])
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    with torch.no_grad():
        cache = ensemble(**inputs, position_ids=positions).past_key_values
        selected = deepcopy(cache)
        selected.batch_select_indices(policy_rows(kept, 3))
        everything = ensemble(step, mask, positions[:, -1:] + 1, cache).logits
        some = ensemble(step[kept], mask[kept], positions[kept, -1:] + 1, selected).logits
    torch.testing.assert_close(some, everything[kept], atol=1e-5, rtol=1e-5)


def test_gradients_reach_weights_and_embeddings(llama):
    weights = torch.tensor(WEIGHTS, requires_grad=True)
    embeddings = torch.randn(2, 5, 32, requires_grad=True)
    loss = llama.ensemble(inputs_embeds=embeddings, weights=weights, labels=torch.randint(261, (2, 5))).loss
    loss.backward()
    assert weights.grad.abs().min() > 0
    assert embeddings.grad.abs().sum() > 0


def test_bfloat16_stays_close_to_float32(llama, make_causal_model, inputs):
    adapters = {name: read_adapter(path) for name, path in llama.ensemble.adapter_paths.items()}
    half = HiddenStateEnsemble(make_causal_model("llama").to(torch.bfloat16), adapters, weights=WEIGHTS)
    with torch.no_grad():
        low, full = half(**inputs).logits, llama.ensemble(**inputs).logits
    assert low.dtype == torch.bfloat16
    assert torch.cosine_similarity(low.float().flatten(), full.flatten(), dim=0) > 0.999
