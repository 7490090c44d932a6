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

    @property
    def bytes(self) -> int:
        """Of its buffers, room included."""
        return 0 if self._buffers is None else sum(buffer.nbytes for buffer in self._buffers)

    def shrink(self) -> None:
        """Gives back room, where less than half of the rows or of the places are taken."""
        assert self.keys is not None
        assert self._buffers is not None
        rows, places = self._buffers[0].shape[0], self._buffers[0].shape[2]
        shown, length = self.keys.shape[0], self.get_seq_length()
        if 2 * shown < rows or 2 * length + _ROOM < places:
            self._reserve(shown + shown // 4, length + max(_ROOM, length // 4))

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Puts rows (N, heads, T, D) behind the others, T at most their length: aligned right, zeros in front."""
        assert self.keys is not None
        assert self._buffers is not None
        shown, length, new = self.keys.shape[0], self.get_seq_length(), keys.shape[2]
        if shown + len(keys) > self._buffers[0].shape[0]:
            self._reserve(max(shown + len(keys), shown + shown // 4), self._buffers[0].shape[2])
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            rows = buffer[shown : shown + len(keys), :, :length]
            rows[:, :, : length - new] = 0  # what is masked must be finite
            rows[:, :, length - new :] = states
        self._show(shown + len(keys), length)

    def shift(self, places: int) -> None:
        """Moves all tokens to the right, with zeros in front, or to the left, where the first ones are dropped."""
        assert self.keys is not None
        assert self._buffers is not None
        rows, length = self.keys.shape[0], self.get_seq_length()
        if length + places > self._buffers[0].shape[2]:
            self._reserve(self._buffers[0].shape[0], length + places + _ROOM)
        for buffer in self._buffers:
            kept = buffer[:rows, :, max(0, -places) : length].clone()  # source and target overlap
            buffer[:rows, :, : max(0, places)] = 0
            buffer[:rows, :, max(0, places) : length + places] = kept
        self._show(rows, length + places)

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
            buffer = states.new_empty(max(rows, shown), states.shape[1], tokens, states.shape[3])
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
