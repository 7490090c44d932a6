"""The encoder of an encoder-decoder for all policies at once, as transformers' `generate()` calls it."""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput


class PolicyEncoder(nn.Module):
    """The encoder of a mixture as `generate()` calls it: once per batch, for all policies."""

    def __init__(self, mixture: Any) -> None:
        super().__init__()
        self._mixture = [mixture]  # in a list, so that it is no submodule of its own part

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Hidden states (B, S, K*H) for input_ids (B, S)."""
        mixture, batch = self._mixture[0], batch_of(input_ids, inputs_embeds)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        rows = {name: mixture._model_rows(value, batch) for name, value in given.items() if value is not None}
        by_row = mixture.policies.get_encoder()(**rows, **kwargs)[0]  # (B*K, S, H)
        hidden: Any = by_row.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)
        return BaseModelOutput(last_hidden_state=hidden)


def batch_of(*tensors: Tensor | None) -> int:
    """How many sequences the first tensor that is given has."""
    given = next((tensor for tensor in tensors if tensor is not None), None)
    if given is None:
        raise ValueError("Neither input_ids nor inputs_embeds given; expected one of them.")
    return given.shape[0]
