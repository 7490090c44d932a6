"""Stacked and summed layers equal one LoRA layer after the other."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from emorl.aggregation.stacked_lora import (
    AggregatingHead,
    StackedLoraLinear,
    SummedLoraLinear,
    mixing,
    policy_rows,
)

K, B, T, IN, OUT, RANK = 3, 2, 5, 8, 6, 4


@pytest.fixture(params=["linear", "convolution"])
def linear(request) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT) if request.param == "linear" else Conv1D(OUT, IN)


@pytest.fixture
def factors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(K, IN, RANK, generator=generator), torch.randn(K, RANK, OUT, generator=generator)


@torch.no_grad()
def test_stacked_rows_get_the_adapter_of_their_policy(linear, factors):
    a, b = factors
    for length in (1, T):
        x = torch.randn(B, K, length, IN)
        for active in (None, (1,), (0, 1), (0, 2)):
            kept = list(range(K)) if active is None else list(active)
            with mixing(torch.ones(B, K), active):
                found = StackedLoraLinear(linear, a, b)(x[:, kept].flatten(0, 1)).view(B, len(kept), length, OUT)
            for row, policy in enumerate(kept):
                expected = linear(x[:, policy].contiguous()) + x[:, policy] @ a[policy] @ b[policy]
                torch.testing.assert_close(found[:, row], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_summed_rows_get_all_adapters_with_their_own_weights(linear, factors):
    a, b = factors
    x, weights = torch.randn(B, T, IN), torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 0.0]])
    with mixing(weights):
        found = SummedLoraLinear(linear, a, b)(x)
    for row in range(B):
        delta = sum(weight * a[policy] @ b[policy] for policy, weight in enumerate(weights[row]))
        torch.testing.assert_close(found[row], linear(x[row]) + x[row] @ delta, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_head_sees_the_weighted_sum_of_hidden_states():
    head, hidden = nn.Linear(IN, OUT), torch.randn(B, K, T, IN)
    weights = torch.tensor([[0.2, 0.0, 0.5], [1.0, 0.0, -1.0]])
    expected = head((weights[:, :, None, None] * hidden).sum(1))
    with mixing(weights):
        torch.testing.assert_close(AggregatingHead(head)(hidden.flatten(0, 1)), expected)
    with mixing(weights, active=(0, 2)):
        torch.testing.assert_close(AggregatingHead(head)(hidden[:, [0, 2]].flatten(0, 1)), expected)
    with mixing(weights, aggregate=False):
        assert AggregatingHead(head)(hidden.flatten(0, 1)).shape == (B * K, T, IN)


def test_policy_rows_are_sequence_major():
    assert policy_rows(torch.tensor([2, 0]), 3).tolist() == [6, 7, 8, 0, 1, 2]


def test_regrouped_tokens_are_refused(linear, factors):
    for layer in (StackedLoraLinear, SummedLoraLinear):
        with pytest.raises(ValueError, match=r"shape \(6, 8\); expected \(rows, T, features\).*mixture-of-experts"):
            layer(linear, *factors)(torch.randn(6, IN))
