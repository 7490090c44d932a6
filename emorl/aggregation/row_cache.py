"""A key-value cache that writes new tokens into room kept free, where transformers' own copies everything every step.

Rows are sequences of K policies each, at the front of a buffer, so rows split and finish by copying only what moves.
"""

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_ROOM = 64  # token places allocated beyond what is needed now, at least


class RowLayer(DynamicLayer):
    """One layer's keys and values (rows, heads, T, D) at the front of a buffer with room for more rows and tokens."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new tokens behind the known ones; returns views of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, length, new = key_states.shape[0], self.get_seq_length(), key_states.shape[-2]
        if length == 0:
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        if not self._has_room(length + new):
            self._reserve(rows, length + new + max(_ROOM, (length + new) // 4))
        assert self._buffers is not None
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, length : length + new] = states
        self._show(rows, length + new)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def load(self, tokens: int, keys: Tensor, values: Tensor, room: int = 0) -> None:
        """Starts anew with keys and values (rows, heads, T, D), where there is to be place for `room` rows of `tokens`;
        keeps its buffers if they are large enough."""
        rows, length = len(keys), keys.shape[2]
        room = max(rows, room)
        self.lazy_initialization(keys, values)
        if self._buffers is None or room > self._buffers[0].shape[0] or tokens > self._buffers[0].shape[2]:
            self.keys, self.values, self._buffers = keys, values, None
            self._reserve(room, tokens)
            return
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            buffer[:rows, :, :length] = states
        self._show(rows, length)

    def move(self, source: Tensor, target: Tensor, rows: int) -> None:
        """Copies rows `source` (N,) to rows `target` (N,), then keeps the first `rows`; allocates if there are more."""
        assert self._buffers is not None
        if rows > self._buffers[0].shape[0]:
            self._reserve(max(rows, 2 * self._buffers[0].shape[0]), self._buffers[0].shape[2])
        if len(source):
            source, target = source.to(self._buffers[0].device), target.to(self._buffers[0].device)
            for buffer in self._buffers:  # whole rows are contiguous: far faster than assigning by index
                buffer.index_copy_(0, target, buffer.index_select(0, source))
        self._show(rows, self.get_seq_length())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps rows `indices` (N,), which may lie on another layer's device."""
        if self.keys is not None:
            super().batch_select_indices(indices.to(self.keys.device))

    def _has_room(self, length: int) -> bool:
        """Whether the buffer holds what `keys` shows, with room for `length` tokens; else something replaced `keys`."""
        assert self.keys is not None
        if self._buffers is None or length > self._buffers[0].shape[2]:
            return False
        return self.keys.data_ptr() == self._buffers[0].data_ptr() and self.keys.shape[0] <= self._buffers[0].shape[0]

    def _reserve(self, rows: int, tokens: int) -> None:
        """New buffers with what `keys` and `values` show in front."""
        assert self.keys is not None
        assert self.values is not None
        shown, length = self.keys.shape[0], self.keys.shape[2]
        buffers = []
        for states in (self.keys, self.values):
            buffer = states.new_empty(rows, states.shape[1], tokens, states.shape[3])
            buffer[:shown, :, :length] = states
            buffers.append(buffer)
        self._buffers = (buffers[0], buffers[1])
        self._show(shown, length)

    def _show(self, rows: int, length: int) -> None:
        assert self._buffers is not None
        self.keys, self.values = (buffer[:rows, :, :length] for buffer in self._buffers)


class RowCache(DynamicCache):
    """A cache of `RowLayer`s; sliding-window layers keep all tokens (the mask hides the old ones)."""

    def __init__(self) -> None:
        Cache.__init__(self, layer_class_to_replicate=RowLayer)


def has_only_full_attention(config: PreTrainedConfig) -> bool:
    """Whether every layer of a model keeps all tokens in its cache."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def has_only_attention(config: PreTrainedConfig) -> bool:
    """Whether a `RowCache` serves a model: every layer attends to tokens, all or those in a window. State-space and linear
    layers keep a state instead, which cannot be split nor cut back."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers)
