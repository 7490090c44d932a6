"""Stacked and summed layers equal one LoRA layer after the other."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from emorl.aggregation.stacked_lora import (
    AggregatingHead,
    StackedLoraLinear,
    SummedLoraLinear,
    policy_rows,
    row_weights,
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
    x = torch.randn(K * B, T, IN)
    found = StackedLoraLinear(linear, a, b)(x)
    for policy in range(K):
        rows = x[policy * B : (policy + 1) * B]
        torch.testing.assert_close(found[policy * B : (policy + 1) * B], linear(rows) + rows @ a[policy] @ b[policy])


@torch.no_grad()
def test_summed_rows_get_all_adapters_with_their_own_weights(linear, factors):
    a, b = factors
    x, weights = torch.randn(B, T, IN), torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 0.0]])
    with row_weights(weights):
        found = SummedLoraLinear(linear, a, b)(x)
    for row in range(B):
        delta = sum(weight * a[policy] @ b[policy] for policy, weight in enumerate(weights[row]))
        torch.testing.assert_close(found[row], linear(x[row]) + x[row] @ delta, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_head_sees_the_weighted_sum_of_hidden_states():
    head, hidden = nn.Linear(IN, OUT), torch.randn(K, B, T, IN)
    weights = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, -1.0]])
    with row_weights(weights):
        found = AggregatingHead(head)(hidden.flatten(0, 1))
    torch.testing.assert_close(found, head((weights.T[:, :, None, None] * hidden).sum(0)))


def test_policy_rows_are_policy_major():
    assert policy_rows(torch.tensor([2, 0]), 3, 2).tolist() == [2, 0, 5, 3]


def test_regrouped_tokens_are_refused(linear, factors):
    for layer in (StackedLoraLinear, SummedLoraLinear):
        with pytest.raises(ValueError, match=r"shape \(6, 8\); expected \(rows, T, features\).*mixture-of-experts"):
            layer(linear, *factors)(torch.randn(6, IN))
