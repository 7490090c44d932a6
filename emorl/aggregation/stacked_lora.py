"""Several LoRA adapters on one shared base model, in one forward: side by side in the batch, or added up per row.

`StackedLoraLinear` gives every policy its own rows, so hidden states can be aggregated (EMORL, arXiv 2505.02579; the
authors run K full models instead). `SummedLoraLinear` adds the weighted adapters inside each layer: the exact parameter
average, whose weights stay a runtime argument. In both the base's parameters are read once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emorl.policies.adapters import Adapter, check_adapter_fits

# Weights of the forward in progress, (B, K). A context variable, because a model's own forward cannot pass them down
# to its linear layers, and because two threads may decode with one model at the same time.
_ROW_WEIGHTS: ContextVar[Tensor] = ContextVar("row_weights")


@contextmanager
def row_weights(weights: Tensor) -> Iterator[None]:
    """Within the block, every layer of this file and the aggregating head use `weights` (B, K)."""
    token = _ROW_WEIGHTS.set(weights)
    try:
        yield
    finally:
        _ROW_WEIGHTS.reset(token)


class StackedLoraLinear(nn.Module):
    """A frozen linear layer with one adapter per policy; rows are policy-major: row `k * B + b` is policy k's b-th."""

    def __init__(self, linear: nn.Module, a: Tensor, b: Tensor) -> None:
        """`linear` is an nn.Linear or GPT-2's Conv1D; a (K, in, r) and b (K, r, out), padded with zeros in rank."""
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(a, requires_grad=False)  # (K, in, r)
        self.b = nn.Parameter(b, requires_grad=False)  # (K, r, out)

    def forward(self, x: Tensor) -> Tensor:
        """x (K*B, T, in) to (K*B, T, out)."""
        _check_rows(x)
        out = self.linear(x)
        policies = self.a.shape[0]
        # Policy-major rows make these reshapes views.
        low = torch.bmm(x.reshape(policies, -1, x.shape[-1]), self.a)  # (K, B*T, r)
        return torch.baddbmm(out.view(policies, -1, out.shape[-1]), low, self.b).view(out.shape)


class SummedLoraLinear(nn.Module):
    """A frozen linear layer plus the weighted sum of all adapters, `x W + sum_k w_k x A_k B_k`, weights per row."""

    def __init__(self, linear: nn.Module, a: Tensor, b: Tensor) -> None:
        """Takes what `StackedLoraLinear` takes and concatenates it along the rank."""
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(a.transpose(0, 1).flatten(1).contiguous(), requires_grad=False)  # (in, K*r)
        self.b = nn.Parameter(b.flatten(0, 1), requires_grad=False)  # (K*r, out)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, in) to (B, T, out)."""
        _check_rows(x)
        weights = _ROW_WEIGHTS.get().to(x.device, x.dtype)  # (B, K)
        batch, policies = weights.shape
        low = (x @ self.a).view(batch, -1, policies, self.a.shape[1] // policies)  # (B, T, K, r)
        low = (low * weights[:, None, :, None]).flatten(2)  # (B, T, K*r)
        out = self.linear(x)
        return out + (low @ self.b).view(out.shape)


def _check_rows(x: Tensor) -> None:
    if x.ndim != 3:
        raise ValueError(
            f"An adapted layer was given a tensor of shape {tuple(x.shape)}; expected (rows, T, features). The base "
            "regroups tokens there, as mixture-of-experts layers do: use adapters that leave such layers out."
        )


class AggregatingHead(nn.Module):
    """The shared output head behind the weighted sum of the policies' last hidden states."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (K*B, T, H), policy-major, to logits (B, T, V); the sum is taken in float32 at least."""
        weights = _ROW_WEIGHTS.get().to(hidden.device)  # (B, K)
        batch, policies = weights.shape
        precision = torch.promote_types(hidden.dtype, weights.dtype)
        blocks = hidden.unflatten(0, (policies, batch)).to(precision)  # (K, B, T, H)
        mixed = torch.einsum("kbth,bk->bth", blocks, weights.to(precision))
        return self.head(mixed.to(hidden.dtype))


def policy_rows(rows: Tensor, batch: int, policies: int) -> Tensor:
    """Where the sequences `rows` (N,) of a batch lie in a policy-major cache or hidden state: indices (K*N,).

    Keep sequences 0 and 2 of 4: `cache.batch_select_indices(policy_rows(torch.tensor([0, 2]), 4, policies))`.
    """
    return (torch.arange(policies, device=rows.device)[:, None] * batch + rows).flatten()


def stack_adapters(
    base_model: PreTrainedModel,
    adapters: Sequence[Adapter],
    layer: Callable[[nn.Module, Tensor, Tensor], nn.Module] = StackedLoraLinear,
) -> PreTrainedModel:
    """A model like `base_model`, with every adapted linear replaced by `layer`.

    It shares the base's parameters and buffers (no copy), and the base itself stays as it is. An adapter without
    factors stands for the bare base; factors are cast to the base's dtype. ValueError if an adapter does not fit.
    """
    for adapter in adapters:
        check_adapter_fits(adapter, base_model)
    shared: dict[int, object] = {id(tensor): tensor for tensor in [*base_model.parameters(), *base_model.buffers()]}
    model = deepcopy(base_model, shared)
    adapted = list(dict.fromkeys(name for adapter in adapters for name in adapter.factors))
    for name in adapted:
        linear = model.get_submodule(name)
        a, b = _padded_stack([adapter.factors.get(name) for adapter in adapters])
        weight = next(linear.parameters())
        dtype = weight.dtype if weight.is_floating_point() else model.dtype  # quantised weights are integers
        model.set_submodule(name, layer(linear, a.to(weight.device, dtype), b.to(weight.device, dtype)))
    return model


def _padded_stack(factors: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
    """Stack factors to a (K, in, r), b (K, r, out) with r the largest rank; what is missing is zero."""
    present = [pair for pair in factors if pair is not None]
    rank = max(a.shape[1] for a, _ in present)
    stacked_a = torch.zeros(len(factors), present[0][0].shape[0], rank)
    stacked_b = torch.zeros(len(factors), rank, present[0][1].shape[1])
    for policy, pair in enumerate(factors):
        if pair is not None:
            stacked_a[policy, :, : pair[0].shape[1]] = pair[0]
            stacked_b[policy, : pair[1].shape[0]] = pair[1]
    return stacked_a, stacked_b
