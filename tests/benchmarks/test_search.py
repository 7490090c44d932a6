"""The three searches that are compared compute the same thing."""

import pytest
import torch

from benchmarks.search import POLICIES, SPACE, authors, best_of_authors, make_case, one_by_one, scores, search, until_end, value
from emorl.aggregation.trie import TrieDecoder

STEPS, END = 10, 1


@pytest.fixture(scope="module", params=["causal", "t5"])
def case(request, make_causal_model, make_seq2seq_model, write_adapter, tokenizer, tmp_path_factory):
    directory, lora = tmp_path_factory.mktemp(request.param), {}
    if request.param == "t5":
        base = make_seq2seq_model(initializer_factor=2.0)
        lora = {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "k", "v", "o", "wi", "wo"]}
    else:
        base = make_causal_model("llama")
    paths = {name: write_adapter(base, directory / name, seed=seed, **lora) for seed, name in enumerate(SPACE.policies)}
    return make_case(base, paths, dict(tokenizer(["hi", "how are you", "x"], return_tensors="pt", padding=True)), END)


def test_the_authors_loop_the_cached_one_and_the_trie_give_the_same_tokens(case):
    weights = torch.tensor([[1.0, 1.0, 1.0], [0.2, 0.9, 0.4]])
    cached = one_by_one(case, STEPS)(weights)
    decode = authors(case, STEPS)
    for row, expected in zip(weights, cached, strict=True):
        assert torch.equal(until_end(decode(row), END, STEPS), expected)
    decoder = TrieDecoder(case.ensemble, **case.inputs, max_new_tokens=STEPS, eos_token_id=END)
    assert torch.equal(decoder.decode(weights), cached)


def test_the_authors_135_points_end_at_the_best_point_of_the_shorter_search(case):
    decoder = TrieDecoder(case.ensemble, **case.inputs, max_new_tokens=STEPS, eos_token_id=END)
    finished, texts, _ = search(decoder.decode)
    assert len(finished) == len(texts) < 135
    assert all(len(found) == POLICIES for found in scores(torch.stack(texts)))
    assert best_of_authors(finished) == dict(max(finished, key=lambda trial: value([trial])[0]).params)
