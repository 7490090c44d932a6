"""How an ensemble reads prompts and further tokens when nothing is aggregated: last hidden states of every policy.

One class per kind of model; trie decoding and the dynamic ensemble ask them for nothing but rows of hidden states and of a
cache.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.aggregation.row_cache import RowCache, RowLayer, has_only_attention
from emorl.aggregation.stacked_lora import mixing

Active = tuple[int, ...] | None
"""The policies that are computed, ascending; None: all."""


def check_cache(ensemble: HiddenStateEnsemble) -> None:
    """Refuses bases whose layers keep a state instead of tokens: ValueError."""
    config = ensemble.config.get_text_config(decoder=True)
    if not has_only_attention(config):
        raise ValueError(
            f"{config.model_type} has layers that keep a state instead of keys and values; the trie and dynamic ensembles "
            "need attention in every layer: use generate(), or another base."
        )


class CausalReader:
    """Prompts are the beginning of what is decoded."""

    across: list[tuple[Tensor, Tensor]] = []  # noqa: RUF012 (an encoder-decoder has some)
    source: Tensor | None = None
    """what an encoder reads"""

    def __init__(self, ensemble: HiddenStateEnsemble, input_ids: Tensor, attention_mask: Tensor) -> None:
        self._ensemble, self._policies = ensemble, len(ensemble.policy_names)
        self.begun, self.mask = input_ids.to(ensemble.device), attention_mask.to(ensemble.device)
        check_cache(ensemble)
        if not bool(self.mask[:, -1].all()):
            raise ValueError("Got prompts padded on the right; expected the left (padding_side='left').")

    def read_prompts(self, which: slice) -> tuple[list[RowLayer], Tensor, Tensor]:
        """Layers with keys of (P*K, heads, S, D), the mask (P, S) of their tokens, last hidden states (P, K, H)."""
        mask = self.mask[which]
        used = mask.any(0)
        mask, ids, cache = mask[:, used], self.begun[which][:, used], RowCache()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = self._forward(ids, mask, positions, cache)
        return _rows_of(cache), mask, hidden

    def read_tokens(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Cache, prompts: Tensor, active: Active = None
    ) -> Tensor:
        """Hidden states (R, K, H) after tokens (R, T) at positions (R, T), seeing the places (R, L) of the cache that
        `mask` shows; of the `active` policies alone, whose rows the cache then holds, (R, len(active), H)."""
        return self._forward(tokens, mask, positions, cache, active)

    def new_cache(self, layers: int) -> Cache:
        """A cache whose layers wait for keys and values."""
        return _empty(layers)

    def load_source(self, cache: Cache, prompts: Tensor, active: Active = None) -> None:
        """Gives an encoder-decoder's cache the sources of `prompts` (R,); nothing to do here."""

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache, active: Active = None) -> Tensor:
        output = self._ensemble(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            active=active,
            aggregate=False,
        )
        return output.logits[:, -1].unflatten(0, (len(ids), -1))  # the head handed on hidden states


class Seq2SeqReader:
    """Prompts are read by each policy's encoder; what is decoded begins with the decoder's start token."""

    def __init__(self, ensemble: HiddenStateEnsemble, input_ids: Tensor, attention_mask: Tensor) -> None:
        self._ensemble, self._policies = ensemble, len(ensemble.policy_names)
        self.source, self._source_mask = input_ids.to(ensemble.device), attention_mask.to(ensemble.device)
        self.mask = torch.ones(len(input_ids), 1, dtype=torch.long, device=ensemble.device)
        start: Any = ensemble.generation_config.decoder_start_token_id
        start = ensemble.config.decoder_start_token_id if start is None else start
        self.begun = self.mask * start  # (P, 1)
        self.across: list[tuple[Tensor, Tensor]] = []  # keys and values over the source, (P, K, heads, S, D)

    def read_prompts(self, which: slice) -> tuple[list[RowLayer], Tensor, Tensor]:
        """As `CausalReader.read_prompts`, of the start token; keeps the keys and values over the source."""
        ids, mask = (tensor[which].repeat_interleave(self._policies, 0) for tensor in (self.source, self._source_mask))
        cache, start = EncoderDecoderCache(RowCache(), RowCache()), self.begun[which]
        with mixing(torch.empty(0), aggregate=False):
            states = self._ensemble.policies.get_encoder()(input_ids=ids, attention_mask=mask)[0]
        hidden = self._forward(start, self.mask[which], cache, mask, states)
        read = [
            (layer.keys.unflatten(0, (-1, self._policies)), layer.values.unflatten(0, (-1, self._policies)))
            for layer in _rows_of(cache.cross_attention_cache)
            if layer.keys is not None and layer.values is not None
        ]
        known = self.across or [(keys[:0], values[:0]) for keys, values in read]
        self.across = [
            (torch.cat([old_keys, keys]), torch.cat([old_values, values]))
            for (old_keys, old_values), (keys, values) in zip(known, read, strict=True)
        ]
        return _rows_of(cache.self_attention_cache), self.mask[which], hidden

    def read_tokens(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Cache, prompts: Tensor, active: Active = None
    ) -> Tensor:
        """As `CausalReader.read_tokens`; positions are the decoder's own business."""
        source_mask = self._source_mask[prompts].repeat_interleave(self._policies if active is None else len(active), 0)
        keys = self.across[0][0]
        size = (len(source_mask), source_mask.shape[1], self._ensemble.config.hidden_size)
        states = keys.new_zeros(1, 1, 1).expand(size)  # cached: not read
        return self._forward(tokens, mask, cache, source_mask, states, active)

    def new_cache(self, layers: int) -> Cache:
        """As `CausalReader.new_cache`, for the decoder's own tokens and for the source."""
        cache = EncoderDecoderCache(_empty(layers), _empty(layers))
        cache.is_updated = dict.fromkeys(range(layers), True)  # the source is loaded, never computed again
        return cache

    def load_source(self, cache: Cache, prompts: Tensor, active: Active = None) -> None:
        """Gives the cache the keys and values over the sources of `prompts` (R,), those of the `active` policies."""
        assert isinstance(cache, EncoderDecoderCache)
        policies = slice(None) if active is None else list(active)
        for layer, (keys, values) in zip(_rows_of(cache.cross_attention_cache), self.across, strict=True):
            chosen_keys, chosen_values = (each[prompts][:, policies].flatten(0, 1) for each in (keys, values))
            layer.load(keys.shape[3], chosen_keys, chosen_values)

    def _forward(
        self, ids: Tensor, mask: Tensor, cache: Cache, source_mask: Tensor, states: Tensor, active: Active = None
    ) -> Tensor:
        policies = self._policies if active is None else len(active)
        ids, mask = (tensor.repeat_interleave(policies, 0) for tensor in (ids, mask))
        with mixing(torch.empty(0), active, aggregate=False):  # the encoder has read already: its rows are by policy
            output = self._ensemble.policies(
                attention_mask=source_mask,
                decoder_input_ids=ids,
                decoder_attention_mask=mask,
                encoder_outputs=(states,),
                past_key_values=cache,
                use_cache=True,
            )
        return output.logits[:, -1].unflatten(0, (-1, policies))


def _empty(layers: int) -> RowCache:
    cache = RowCache()
    cache.layers.extend(RowLayer() for _ in range(layers))
    return cache


def _rows_of(cache: Cache) -> list[RowLayer]:
    return cache.layers  # type: ignore[return-value]
