"""Tokens are drawn from the distribution that transformers' own processors leave, each text by its own number."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from emorl.aggregation.sampling import choose

DRAWS = 4000


def drawn_shares(logits, temperature, top_p, top_k):
    """How often each token is chosen by evenly spread numbers."""
    numbers = (torch.arange(DRAWS) + 0.5) / DRAWS
    rows = logits.expand(DRAWS, -1)
    given = (torch.full((DRAWS,), value) for value in (temperature, top_p, top_k))
    return torch.bincount(choose(rows, *given, numbers), minlength=logits.shape[-1]) / DRAWS


def expected_shares(logits, temperature, top_p, top_k):
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("vocabulary", [30, 3000])  # more than are looked at without sorting
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.7, 0), (1.0, 5), (0.6, 8), (0.999, 0), (1.0, 2000)])
def test_the_distribution_is_that_of_transformers_processors(vocabulary, temperature, top_p, top_k):
    logits = 2 * torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    found = drawn_shares(logits, temperature, top_p, top_k)
    wanted = expected_shares(logits, temperature, top_p, min(top_k, vocabulary))
    assert (found - wanted).abs().max() < 2 / DRAWS
    assert not bool(found[wanted == 0].any())


@pytest.mark.parametrize(("temperature", "top_p"), [(1e-40, 1.0), (1.0, 1e-50), (1e-45, 1e-45)])
def test_settings_too_small_for_a_float_give_the_most_probable_token(temperature, top_p):
    logits = 3e4 * torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    given = (torch.tensor([value], dtype=torch.float32) for value in (temperature, top_p, 0))
    assert choose(logits, *given, torch.tensor([0.99])) == logits.argmax()


def test_a_number_that_rounds_to_1_chooses_a_token_that_is_possible():
    logits = torch.tensor([[5.0, 4.0, -50.0, -60.0, -torch.inf]])
    given = (torch.tensor([value]) for value in (1.0, 0.9, 0.0))
    assert choose(logits, *given, torch.tensor([0.99999999])) == 1


def test_rows_with_different_settings_are_chosen_as_each_alone():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 50, generator=generator)
    temperature = torch.tensor([0.0, 1.0, 0.3, 2.0, 1.0, 0.0])
    top_p, top_k = torch.tensor([1.0, 0.5, 1.0, 0.9, 1.0, 0.1]), torch.tensor([0, 0, 4, 7, 0, 1])
    numbers = torch.rand(6, generator=generator)
    together = choose(logits, temperature, top_p, top_k, numbers)
    alone = [choose(*(given[row : row + 1] for given in (logits, temperature, top_p, top_k, numbers))) for row in range(6)]
    assert together.tolist() == [int(token) for token in alone]
    assert together[0] == logits[0].argmax()
    assert together[5] == logits[5].argmax()
