"""Several LoRA adapters on one shared base model, in one forward: side by side in the batch, or added up per row.

`StackedLoraLinear` gives every policy its own rows, so hidden states can be aggregated (EMORL, arXiv 2505.02579; the
authors run K full models instead). `SummedLoraLinear` adds the weighted adapters inside each layer: the exact parameter
average, whose weights stay a runtime argument. In both the base's parameters are read once.

Rows are sequence-major: row `b * K + k` is policy k's part of sequence b. So a key-value cache grows, shrinks and splits
by whole sequences at its end.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emorl.policies.adapters import Adapter, check_adapter_fits
from emorl.policies.placement import device_of, shared_with_copies

# Names that transformers gives to layers which read one and the same input. Wrong guesses cost time, not correctness.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("q", "k", "v"), ("gate_proj", "up_proj"), ("wi_0", "wi_1"))
_CROSS_ATTENTION = ("EncDecAttention", "encoder_attn")  # its k and v read the encoder's states, once


@dataclass(frozen=True, eq=False)
class Mixing:
    """How the forward in progress combines the policies."""

    weights: Tensor  # (B, K), of all policies
    active: tuple[int, ...] | None = None  # ascending; the policies that have rows; None: all
    aggregate: bool = True  # False: the head hands on the policies' hidden states
    last_product: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)  # projection -> its input, x A


# A context variable, because a model's own forward cannot pass this down to its linear layers, and because two threads
# may decode with one model at the same time.
_MIXING: ContextVar[Mixing] = ContextVar("mixing")


@contextmanager
def mixing(weights: Tensor, active: tuple[int, ...] | None = None, aggregate: bool = True) -> Iterator[Mixing]:
    """Within the block, all layers of this file combine the policies as said here; see `Mixing`."""
    token = _MIXING.set(Mixing(weights, active, aggregate))
    try:
        yield _MIXING.get()
    finally:
        _MIXING.reset(token)


def current_mixing() -> Mixing:
    """What the innermost `mixing` block says; LookupError outside of one."""
    return _MIXING.get()


class SharedProjection(nn.Module):
    """x A of all policies for layers that read one input (q, k and v; gate and up): one product instead of three."""

    def __init__(self, factors: Sequence[Tensor]) -> None:
        """`factors`: A (K, in, r) of each layer; ranks may differ."""
        super().__init__()
        self.a = nn.Parameter(torch.cat(list(factors), 2), requires_grad=False)  # (K, in, sum of r)

    def forward(self, x: Tensor) -> Tensor:
        """x (B*K, T, in) to (K, B*T, sum of r); asked again with the same input, it remembers."""
        mix = current_mixing()
        known = mix.last_product.get(self)
        if known is not None and known[0] is x:
            return known[1]
        a = _of_policies(self.a, mix.active)
        product = torch.bmm(x.unflatten(0, (-1, a.shape[0])).transpose(0, 1).flatten(1, 2), a)  # no copy where T is 1
        mix.last_product.clear()  # siblings are called one after the other; older inputs would only hold memory
        mix.last_product[self] = (x, product)
        return product


class StackedLoraLinear(nn.Module):
    """A frozen linear layer with one adapter per policy and one row per policy and sequence."""

    projection: SharedProjection
    columns: slice

    def __init__(self, linear: nn.Module, a: Tensor, b: Tensor) -> None:
        """`linear` is an nn.Linear or GPT-2's Conv1D; a (K, in, r) and b (K, r, out), padded with zeros in rank."""
        super().__init__()
        self.linear: Any = linear
        self.projection = SharedProjection([a])
        self.columns = slice(0, a.shape[2])  # its own part of the projection
        self.b = nn.Parameter(b, requires_grad=False)  # (K, r, out)

    @property
    def weight(self) -> Tensor:
        """The base's, for models that look at its dtype (T5)."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """x (B*K, T, in) to (B*K, T, out)."""
        _check_rows(x)
        b = _of_policies(self.b, current_mixing().active)
        low = self.projection(x)[..., self.columns]  # (K, B*T, r)
        out = self.linear(x)
        by_policy = out.unflatten(0, (-1, b.shape[0])).transpose(0, 1)  # (K, B, T, out), a view
        if x.shape[1] == 1:
            by_policy.squeeze(2).baddbmm_(low, b)
        else:
            by_policy.add_(torch.bmm(low, b).unflatten(1, (-1, x.shape[1])))
        return out


def _of_policies(stacked: Tensor, active: tuple[int, ...] | None) -> Tensor:
    """The part of a tensor (K, ...) that belongs to the active policies; a view where they are adjacent."""
    if active is None:
        return stacked
    if active[-1] - active[0] == len(active) - 1:
        return stacked[active[0] : active[-1] + 1]
    return stacked[list(active)]


class SummedLoraLinear(nn.Module):
    """A frozen linear layer plus the weighted sum of all adapters, `x W + sum_k w_k x A_k B_k`, weights per row."""

    def __init__(self, linear: nn.Module, a: Tensor, b: Tensor) -> None:
        """Takes what `StackedLoraLinear` takes and concatenates it along the rank."""
        super().__init__()
        self.linear: Any = linear
        self.a = nn.Parameter(a.transpose(0, 1).flatten(1).contiguous(), requires_grad=False)  # (in, K*r)
        self.b = nn.Parameter(b.flatten(0, 1), requires_grad=False)  # (K*r, out)

    @property
    def weight(self) -> Tensor:
        """The base's, for models that look at its dtype (T5)."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, in) to (B, T, out)."""
        _check_rows(x)
        weights = current_mixing().weights.to(x.device, x.dtype)  # (B, K)
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
        """hidden (B*K, T, H) to logits (B, T, V). Where the `mixing` block asks for no aggregation, `hidden` itself, scaled by
        whatever the family does between its last norm and its head."""
        return self.head(aggregated(hidden)) if current_mixing().aggregate else hidden


def aggregated(hidden: Tensor) -> Tensor:
    """The weighted sum (B, T, H) of the policies' last hidden states (B*K, T, H), as the `mixing` block says; in float32 at
    least, also under autocast."""
    mix = current_mixing()
    weights = mix.weights.to(hidden.device)  # (B, K)
    if mix.active is not None:
        weights = weights[:, list(mix.active)]
    precision = torch.promote_types(hidden.dtype, weights.dtype)
    blocks = hidden.unflatten(0, tuple(weights.shape)).to(precision)  # (B, K, T, H)
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.einsum("bkth,bk->bth", blocks, weights.to(precision)).to(hidden.dtype)


def policy_rows(rows: Tensor, policies: int) -> Tensor:
    """Where the sequences `rows` (N,) of a batch lie in a cache or hidden state of K rows each: indices (N*K,).

    Keep sequences 0 and 2 of a batch: `cache.batch_select_indices(policy_rows(torch.tensor([0, 2]), policies))`.
    """
    return (rows[:, None] * policies + torch.arange(policies, device=rows.device)).flatten()


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
    model = deepcopy(base_model, shared_with_copies(base_model))
    adapted = list(dict.fromkeys(name for adapter in adapters for name in adapter.factors))
    for name in adapted:
        linear = model.get_submodule(name)
        a, b = _padded_stack([adapter.factors.get(name) for adapter in adapters])
        weight = next(linear.parameters())
        dtype = weight.dtype if weight.is_floating_point() else model.dtype  # quantised weights are integers
        device = device_of(linear)
        model.set_submodule(name, layer(linear, a.to(device, dtype), b.to(device, dtype)))
    for name, module in model.named_modules():
        if not name.endswith(_CROSS_ATTENTION):
            _share_projections(module)
    return model


def _share_projections(parent: nn.Module) -> None:
    """Gives children of `parent` that read the same input one projection for all of them."""
    children = dict(parent.named_children())
    for names in _SIBLINGS:
        layers = [layer for name in names if isinstance(layer := children.get(name), StackedLoraLinear)]
        if len(layers) < 2:
            continue
        projection = SharedProjection([layer.projection.a for layer in layers])
        end = 0
        for layer in layers:
            rank = layer.columns.stop
            layer.projection, layer.columns, end = projection, slice(end, end + rank), end + rank


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
