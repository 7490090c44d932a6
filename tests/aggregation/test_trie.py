"""Trie decoding gives the tokens that each candidate gets alone: random models, weights, ragged prompts, early ends."""

import numpy as np
import pytest
import torch

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.aggregation.prefixes import Choices, PrefixTree, undominated
from emorl.aggregation.trie import TrieDecoder
from emorl.policies.adapters import read_adapter

STEPS = 14
PROMPTS = ["hello", "how are you today", "a", "please tell me more", "hello you"]
CAUSAL = ["llama", "qwen3", "mistral", "gemma3_text", "gpt2", "gpt_neox", "phi"]
T5 = {"relu": ["q", "k", "v", "o", "wi", "wo"], "gated-gelu": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]}


@pytest.fixture(scope="module")
def make_ensemble(make_causal_model, make_seq2seq_model, write_adapter, tmp_path_factory):
    made = {}

    def make(family: str, policies: int = 3, seed: int = 0) -> HiddenStateEnsemble:
        key = (family, policies, seed)
        if key not in made:
            directory, lora = tmp_path_factory.mktemp(family), {}
            if family in T5:
                base = make_seq2seq_model(seed, feed_forward_proj=family, tie_word_embeddings=False, initializer_factor=3.0)
                lora = {"target_modules": T5[family], "task_type": "SEQ_2_SEQ_LM"}
            else:
                base = make_causal_model(family, seed)
            paths = [write_adapter(base, directory / str(k), rank=2 + k, seed=10 * seed + k, **lora) for k in range(policies)]
            made[key] = HiddenStateEnsemble(base, {path.name: read_adapter(path) for path in paths})
        return made[key]

    return make


def random_weights(candidates: int, policies: int, seed: int) -> torch.Tensor:
    """Close ones, far ones and each policy alone: shared and distinct prefixes."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(candidates, policies, generator=generator)
    weights[: candidates // 2] = weights[0] + 0.05 * weights[: candidates // 2]
    return torch.cat([weights, torch.eye(policies)])


def alone(ensemble, inputs, weights, end=None) -> torch.Tensor:
    """Every candidate by itself through generate(): (C, P, T), padded with 0."""
    rows = []
    for row in weights:
        tokens = ensemble.generate(
            **inputs, weights=row, max_new_tokens=STEPS, do_sample=False, eos_token_id=end, pad_token_id=0
        )
        length = 1 if ensemble.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        new = tokens[:, length:]
        rows.append(torch.nn.functional.pad(new, (0, STEPS - new.shape[1])))
    return torch.stack(rows).cpu()


@pytest.fixture(scope="module")
def inputs(tokenizer):
    return dict(tokenizer(PROMPTS, return_tensors="pt", padding=True))


@pytest.mark.parametrize("family", [*CAUSAL, *T5])
def test_every_family_gives_the_tokens_of_each_candidate_alone(family, make_ensemble, inputs):
    ensemble, weights = make_ensemble(family), random_weights(8, 3, 0)
    expected = alone(ensemble, inputs, weights)
    decoder = TrieDecoder(ensemble, **inputs, max_new_tokens=STEPS)
    assert torch.equal(decoder.decode(weights), expected)
    assert len(set(map(tuple, expected.flatten(0, 1).tolist()))) > len(PROMPTS)  # the candidates do differ
    assert decoder.work.rows < expected.numel()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "relu"])
def test_cuda_gives_the_tokens_of_each_candidate_alone(family, make_ensemble, inputs):
    ensemble, weights = make_ensemble(family, seed=9).to("cuda"), random_weights(8, 3, 0)
    inputs = {name: tensor.to("cuda") for name, tensor in inputs.items()}
    decoder = TrieDecoder(ensemble, **inputs, max_new_tokens=STEPS)
    assert torch.equal(decoder.decode(weights), alone(ensemble, inputs, weights))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", ["llama", "relu"])
def test_random_models_weights_and_early_ends(family, seed, make_ensemble, inputs):
    policies = 2 + seed % 3
    ensemble, weights = make_ensemble(family, policies, seed), random_weights(10, policies, seed)
    free = alone(ensemble, inputs, weights)
    ends = free[:, :, 2:9].unique()[::7].tolist()  # some candidates end early, others never
    expected = alone(ensemble, inputs, weights, ends)
    decoder = TrieDecoder(ensemble, **inputs, max_new_tokens=STEPS, eos_token_id=ends)
    assert torch.equal(decoder.decode(weights), expected)
    assert (expected[:, :, -1] == 0).any()
    assert decoder.work.tokens < free.numel()


@pytest.mark.parametrize("family", ["llama", "gpt2", "relu"])
def test_later_calls_go_on_from_what_is_known(family, make_ensemble, inputs):
    ensemble = make_ensemble(family)
    decoder = TrieDecoder(ensemble, **inputs, max_new_tokens=STEPS)
    for seed, prompts in ((0, None), (1, [3, 0]), (2, None)):
        weights = random_weights(6, 3, seed)
        expected = alone(ensemble, inputs, weights)
        found = decoder.decode(weights, prompts)
        assert torch.equal(found, expected if prompts is None else expected[:, prompts])
        rows = decoder.work.rows
        assert torch.equal(decoder.decode(weights, prompts), found)
        assert decoder.work.rows == rows  # nothing was computed again


@pytest.mark.parametrize("family", ["llama", "relu"])
@pytest.mark.parametrize("share", [1.0, 1.4, 3.0])
def test_any_memory_limit_gives_the_same_tokens(family, share, make_ensemble, inputs):
    ensemble, weights = make_ensemble(family), random_weights(10, 3, 4)
    with pytest.raises(ValueError, match="bytes of memory do not hold these prompts; expected at least") as refused:
        TrieDecoder(ensemble, **inputs, max_new_tokens=STEPS, memory=1000)
    memory = int(share * int(str(refused.value).rstrip(".").split()[-1]))
    decoder = TrieDecoder(ensemble, **inputs, max_new_tokens=STEPS, memory=memory)
    expected = alone(ensemble, inputs, weights)
    assert torch.equal(decoder.decode(weights), expected)
    assert torch.equal(decoder.decode(weights.flip(0)), expected.flip(0))


def test_the_scale_of_weights_does_not_matter(make_ensemble, inputs):
    decoder = TrieDecoder(make_ensemble("llama"), **inputs, max_new_tokens=STEPS)
    weights = random_weights(4, 3, 1)
    assert torch.equal(decoder.decode(weights * 4), decoder.decode(weights))


def test_one_policy_and_the_base_as_a_policy(make_causal_model, write_adapter, inputs, tmp_path):
    base = make_causal_model("llama")
    adapter = {"only": read_adapter(write_adapter(base, tmp_path))}
    for include_base in (False, True):
        ensemble = HiddenStateEnsemble(base, adapter, include_base=include_base)
        weights = random_weights(3, 1 + include_base, 0)
        decoder = TrieDecoder(ensemble, **inputs, max_new_tokens=STEPS)
        assert torch.equal(decoder.decode(weights), alone(ensemble, inputs, weights))


def test_bfloat16_agrees_but_for_ties(make_causal_model, write_adapter, inputs, tmp_path):
    base = make_causal_model("llama").to(torch.bfloat16)
    adapters = {str(k): read_adapter(write_adapter(base, tmp_path / str(k), seed=k)) for k in range(3)}
    ensemble, weights = HiddenStateEnsemble(base, adapters), random_weights(6, 3, 0)
    found = TrieDecoder(ensemble, **inputs, max_new_tokens=STEPS).decode(weights)
    same = (found == alone(ensemble, inputs, weights)).all(-1)  # (C, P)
    assert same.float().mean() > 0.7


@pytest.mark.parametrize("weights", [[[1.0, -0.1, 0]], [[0.0, 0.0, 0.0]], [[float("nan"), 1, 1]], [[1.0, 1.0]], [1.0, 1, 1]])
def test_weights_it_cannot_decode_are_refused(weights, make_ensemble, inputs):
    decoder = TrieDecoder(make_ensemble("llama"), **inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match="Got weights"):
        decoder.decode(torch.tensor(weights))


def test_weights_may_be_lists_and_prompts_must_be_there(make_ensemble, inputs):
    decoder = TrieDecoder(make_ensemble("llama"), **inputs, max_new_tokens=3)
    weights = [[0.5, 0.3, 0.2]]
    assert torch.equal(decoder.decode(weights), decoder.decode(torch.tensor(weights)))
    for prompts in ([], [len(PROMPTS)], [-1]):
        with pytest.raises(ValueError, match="expected at least one of 0 to"):
            decoder.decode(weights, prompts)


def test_prompts_padded_on_the_right_are_refused(make_ensemble, inputs):
    turned = {name: tensor.flip(1) for name, tensor in inputs.items()}
    with pytest.raises(ValueError, match="padded on the right"):
        TrieDecoder(make_ensemble("llama"), **turned, max_new_tokens=3)


def test_what_no_weights_can_choose_is_left_out():
    logits = torch.tensor([[[3.0, 0, 2, 1, 1], [0, 3, 2, 1, 1]], [[9.0, 1, 1, 1, 1], [9, 1, 1, 1, 1]]])  # (N, K, V)
    found = undominated(logits)
    assert found.count.tolist() == [3, 1]
    assert found.tokens.tolist() == [0, 1, 2, 0]
    choices = Choices()
    choices.extend_to(2)
    choices.open(np.array([1, 0]), found)
    weights = np.array([[1, 0], [0, 1], [0.5, 0.5], [0.5, 0.5]], np.float32)
    assert choices.choose(np.array([1, 1, 1, 0]), weights).tolist() == [0, 1, 2, 0]


def test_choices_are_those_of_all_tokens():
    generator = torch.Generator().manual_seed(0)
    check_choices(torch.randn(20, 4, 500, generator=generator), torch.rand(20, 4, generator=generator))


def test_of_equal_tokens_the_first_is_chosen():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (300, 2, 8), generator=generator).float()
    check_choices(logits, torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).repeat(100, 1))


def check_choices(logits: torch.Tensor, weights: torch.Tensor) -> None:
    choices = Choices()
    choices.extend_to(len(logits))
    choices.open(np.arange(len(logits)), undominated(logits))
    expected = torch.einsum("nkv,nk->nv", logits, weights).argmax(-1)
    assert choices.choose(np.arange(len(logits)), weights.numpy()).tolist() == expected.tolist()


def test_paths_lead_from_the_root_to_each_prefix():
    tree = PrefixTree(2)
    first = tree.add(np.array([0, 1]), np.array([7, 8]))
    second = tree.add(first[1:], np.array([9]))
    paths, roots = tree.paths(np.array([1, 2, 4]))
    assert paths.tolist() == [[-1, -1], [-1, 2], [3, 4]]
    assert roots.tolist() == [1, 0, 1]
    assert tree.children(np.array([0, 1, 3, 4]), np.array([7, 7, 9, 1])).tolist() == [2, -1, second[0], -1]
