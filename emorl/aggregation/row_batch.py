"""Texts that decode side by side while they come and go (continuous batching): a prompt is read, joins, and leaves at its end.

Rows lie in one `RowCache`, aligned right, K policies of a text beside each other. A text that leaves is replaced by the last
one; one that joins goes behind the others. What a text gets does not depend on its neighbours, up to rounding: each has its own
weights, and a mask hides what lies before its first token.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from emorl.aggregation.ensemble import AdapterMixture
from emorl.aggregation.given_weights import active_policies
from emorl.aggregation.row_cache import RowCache, RowLayer, has_only_attention

_SLACK = 64  # places in front of every text that are not worth closing

Layers = Sequence[tuple[Tensor, Tensor]]
"""keys and values of a text's tokens, (K, heads, T, D) by layer"""


def can_join(mixture: AdapterMixture) -> bool:
    """Whether texts of this base can come and go: a decoder whose layers all attend, without a bias behind its head."""
    if mixture.config.is_encoder_decoder or any(name.endswith("final_logits_bias") for name, _ in mixture.named_buffers()):
        return False
    return has_only_attention(mixture.config.get_text_config(decoder=True))


class PromptReading:
    """A prompt on its way into the cache, some tokens at a time, so that nobody waits long for a long one."""

    def __init__(self, mixture: AdapterMixture, ids: Sequence[int], weights: Tensor, known: Layers = ()) -> None:
        """
        Args:
            ids: the prompt's tokens, at least one.
            weights: of the text, (K,); policies without weight are not computed.
            known: keys and values of its first tokens, fewer than it has, which are then not read.
        """
        self._mixture, self._ids, self.weights = mixture, torch.tensor([list(ids)], device=mixture.device), weights
        self.active = active_policies(weights[None]) if mixture.has_rows_by_policy else None
        self._cache, self.read_tokens = RowCache(), 0
        for keys, values in known:
            layer = RowLayer()
            layer.load(len(ids), keys, values)
            self._cache.layers.append(layer)
            self.read_tokens = keys.shape[2]

    @property
    def is_read(self) -> bool:
        return self.read_tokens == self._ids.shape[1]

    @property
    def layers(self) -> Layers:
        """Of the tokens read so far; views."""
        return [(layer.keys, layer.values) for layer in _layers(self._cache)]  # type: ignore[misc]

    @torch.no_grad()
    def read(self, most: int, keep: int = 1) -> Tensor:
        """Reads up to `most` further tokens; logits (T, V) behind the last `keep` of them, 0 for all."""
        end = min(self._ids.shape[1], self.read_tokens + most)
        output = self._mixture(
            input_ids=self._ids[:, self.read_tokens : end],
            attention_mask=torch.ones_like(self._ids[:, :end]),
            position_ids=torch.arange(self.read_tokens, end, device=self._ids.device)[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
            weights=self.weights,
            active=self.active,
        )
        self.read_tokens = end
        return output.logits[0]


class RowBatch:
    """Texts of one mixture that have the same active policies, one row of weights each.

    >>> batch.join(reading)           # read to its end
    >>> logits = batch.step([token])  # one token for each text
    >>> batch.leave([0])              # whose places the others take
    """

    def __init__(self, mixture: AdapterMixture, active: tuple[int, ...] | None) -> None:
        self._mixture, self._active = mixture, active
        self._cache = RowCache()
        self._weights = torch.empty(0, len(mixture.policy_names))  # (R, K)
        self._start = np.empty(0, np.int64)  # (R,), place of each text's first token

    def __len__(self) -> int:
        return len(self._start)

    @property
    def length(self) -> int:
        """Token places that every text takes."""
        return self._cache.get_seq_length() if len(self) else 0

    def join(self, reading: PromptReading) -> None:
        """Adds a text whose prompt is read, behind the others. The reading stays as it is: it may join again."""
        assert reading.is_read
        if not len(self):
            self._cache = RowCache()
            for keys, values in reading.layers:
                layer = RowLayer()
                layer.load(keys.shape[2] + _SLACK, keys, values)
                self._cache.layers.append(layer)
        else:
            self._make_room(reading.read_tokens)
            for layer, (keys, values) in zip(_layers(self._cache), reading.layers, strict=True):
                layer.add(keys, values)
        self._start = np.append(self._start, self._cache.get_seq_length() - reading.read_tokens)
        self._weights = torch.cat([self._weights, reading.weights[None]])

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Every text's next token is read: logits (R, V) behind it."""
        device, place = self._mixture.device, self.length
        mask = torch.from_numpy(np.arange(place + 1) >= self._start[:, None])
        output = self._mixture(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            attention_mask=mask.long().to(device),
            position_ids=torch.from_numpy(place - self._start)[:, None].to(device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            weights=self._weights,
            active=self._active,
        )
        return output.logits[:, -1]

    def leave(self, rows: Sequence[int]) -> list[int]:
        """Drops texts; for each that stays, in the new order, where it was."""
        staying = len(self) - len(set(rows))
        if not staying:
            self._cache, self._start, self._weights = RowCache(), self._start[:0], self._weights[:0]
            return []
        gone = set(rows)
        movers = iter([row for row in range(staying, len(self)) if row not in gone])
        order = [next(movers) if row in gone else row for row in range(staying)]
        moved = [(source, target) for target, source in enumerate(order) if source != target]
        lanes = self.rows_by_text
        source, target = (
            torch.tensor([row * lanes + lane for row in places for lane in range(lanes)], dtype=torch.long)
            for places in ([source for source, _ in moved], [target for _, target in moved])
        )
        for layer in _layers(self._cache):
            layer.move(source, target, staying * lanes)
        self._start, self._weights = self._start[order], self._weights[order]
        if self._start.min() > max(_SLACK, self.length // 4):
            self._shift(-int(self._start.min()))
        for layer in _layers(self._cache):
            layer.shrink()
        return order

    @property
    def bytes(self) -> int:
        """Of its keys and values, with the room kept for more."""
        return sum(layer.bytes for layer in _layers(self._cache))

    @property
    def rows_by_text(self) -> int:
        """Rows of the cache that each text takes."""
        return _layers(self._cache)[0].keys.shape[0] // len(self) if len(self) else 0  # type: ignore[union-attr]

    def _make_room(self, tokens: int) -> None:
        if tokens > self.length:
            self._shift(tokens - self.length)

    def _shift(self, places: int) -> None:
        for layer in _layers(self._cache):
            layer.shift(places)
        self._start = self._start + places


def _layers(cache: RowCache) -> list[RowLayer]:
    return cache.layers  # type: ignore[return-value]
