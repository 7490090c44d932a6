"""Policies of one base that write together: hidden-state aggregation (EMORL) whose weights may change after every span.

One forward for all policies with a weight, one cache with K rows per text. A policy that no text gives a weight is not run;
its keys and values are put aside, and it reads what it missed when it returns.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache, PreTrainedTokenizerBase

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.aggregation.reading import CausalReader, Seq2SeqReader, check_cache
from emorl.aggregation.row_cache import RowLayer
from emorl.aggregation.stacked_lora import AggregatingHead, policy_rows
from emorl.dynamic.engines.engine import SIGNALS, Decoding, check_weights, distribution_signals
from emorl.dynamic.engines.sampling import choose, random_numbers
from emorl.dynamic.engines.settings import check_settings, processors_of, say_sampling
from emorl.policies.generation import end_tokens
from emorl.policies.prompts import decode, encode

_Layers = list[tuple[Tensor, Tensor]]  # keys and values of each layer


class StackedEngine:
    """An `Engine` of the policies of an ensemble.

    >>> engine = StackedEngine(HiddenStateEnsemble(base.model, adapters), base.tokenizer)
    >>> writing = engine.begin(["Hello"], Decoding(max_new_tokens=16))
    >>> writing.write(torch.tensor([[0.7, 0.3]]), span=8)
    """

    def __init__(self, ensemble: HiddenStateEnsemble, tokenizer: PreTrainedTokenizerBase) -> None:
        if any(name.endswith("final_logits_bias") for name, _ in ensemble.named_buffers()):
            raise ValueError(
                f"{ensemble.config.model_type} adds a bias behind its head, and counts positions from the start of a cache; "
                "a dynamic ensemble needs another base, such as T5 or a decoder."
            )
        check_cache(ensemble)
        check_settings("the base", ensemble)
        self.ensemble, self.tokenizer = ensemble, tokenizer
        self.names, self.device = ensemble.policy_names, ensemble.device
        self.state_width: int = ensemble.config.get_text_config(decoder=True).hidden_size
        self.ends = torch.tensor(end_tokens(ensemble, tokenizer), device=ensemble.device)

    def begin(self, prompts: Sequence[Any], decoding: Decoding, seeds: Sequence[int] | None = None) -> "StackedWriting":
        """As `Engine.begin`."""
        return StackedWriting(self, prompts, decoding, range(len(prompts)) if seeds is None else seeds)


class StackedWriting:
    """A `Writing`. Texts that end leave the batch, A texts are still written; rows of the cache are text-major."""

    @torch.no_grad()
    def __init__(self, engine: StackedEngine, prompts: Sequence[Any], decoding: Decoding, seeds: Sequence[int]) -> None:
        self._engine, self._decoding = engine, decoding
        self._policies, device = len(engine.names), engine.ensemble.device
        inputs = encode(engine.tokenizer, prompts)
        kind = Seq2SeqReader if engine.ensemble.config.is_encoder_decoder else CausalReader
        self._reader = kind(engine.ensemble, inputs["input_ids"], inputs["attention_mask"])  # type: ignore[arg-type]
        layers, self._mask, self._hidden = self._reader.read_prompts(slice(None))  # (A, T), (A, K, H)
        say_sampling("the base", engine.ensemble, decoding)
        self._begun = self._reader.begun
        self._process = processors_of(engine.ensemble, decoding, self._begun, self._reader.mask, self._reader.source)
        self._positions = self._mask.sum(1, keepdim=True)  # (A, 1) of the next token
        self._room = self._mask.shape[1] + decoding.max_new_tokens
        self._open = torch.arange(len(prompts), device=device)  # (A,) which texts these are
        self._weights = torch.ones(len(prompts), self._policies, device=device)  # (A, K); 0: this text is not run there
        self._active = tuple(range(self._policies))
        self._cache = self._filled([(layer.keys, layer.values) for layer in layers], self._active)
        self._aside: dict[int, _Layers] = {}  # policy -> keys and values (A, heads, L, D) by layer
        self._uniform = random_numbers(decoding, seeds).to(device)  # (B, max_new_tokens)
        self._written = torch.zeros(len(prompts), decoding.max_new_tokens, dtype=torch.long, device=device)
        self._tokens = torch.zeros(len(prompts), dtype=torch.long, device=device)
        self._steps = 0  # tokens of every open text
        self._signals = torch.zeros(len(prompts), self._policies, len(SIGNALS))
        self._signals_known = False
        self._states = torch.zeros(len(prompts), self._policies, engine.state_width)

    @property
    @torch.no_grad()
    def signals(self) -> Tensor:
        """As `Writing.signals`."""
        if not self._signals_known and len(self._open):
            ran, active = self._weights > 0, list(self._active)  # (A, K)
            probabilities = torch.softmax(self._logits(self._hidden).float(), -1)
            fresh = distribution_signals(probabilities, ran[:, active]).cpu()
            found = self._signals[self._open.cpu()]  # (A, K, S), a copy
            found[:, active, :-1] = torch.where(ran[:, active, None].cpu(), fresh, found[:, active, :-1])
            found[..., -1] = (~ran).float().cpu()
            self._signals[self._open.cpu()] = found
            self._signals_known = True
        return self._signals.clone()

    @property
    def states(self) -> Tensor:
        """As `Writing.states`."""
        rows, policies = (self._weights[:, list(self._active)] > 0).cpu().nonzero(as_tuple=True)
        of_policies = torch.tensor(self._active, dtype=torch.long)[policies]
        self._states[self._open.cpu()[rows], of_policies] = self._hidden.float().cpu()[rows, policies]
        return self._states.clone()

    @property
    def finished(self) -> Tensor:
        """As `Writing.finished`."""
        found = torch.ones(len(self._tokens), dtype=torch.bool)
        found[self._open.cpu()] = False
        return found

    @property
    def texts(self) -> list[str]:
        """As `Writing.texts`."""
        rows = [row[:count] for row, count in zip(self._written.tolist(), self._tokens.tolist(), strict=True)]
        return decode(self._engine.tokenizer, rows)

    @property
    def tokens(self) -> list[int]:
        """As `Writing.tokens`."""
        return self._tokens.tolist()

    @torch.no_grad()
    def write(self, weights: Tensor, span: int) -> None:
        """As `Writing.write`."""
        check_weights(weights, span, (len(self._tokens), self._policies))
        if not len(self._open):
            return
        self._signals_known = False
        self._weights = weights.to(self._mask.device, torch.float32)[self._open]
        self._activate(tuple((self._weights > 0).any(0).nonzero().flatten().tolist()))
        for _ in range(span):
            of_active = self._weights[:, list(self._active)].to(torch.promote_types(self._hidden.dtype, torch.float32))
            mixed = torch.einsum("akh,ak->ah", self._hidden.to(of_active.dtype), of_active)
            logits = self._logits(mixed.to(self._hidden.dtype))  # (A, V)
            logits = self._processed(logits)
            tokens = choose(logits, self._decoding, self._uniform[self._open, self._steps])  # (A,)
            self._append(tokens)
            if not len(self._open):
                return

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self._engine.ensemble.policies.get_output_embeddings()
        assert isinstance(head, AggregatingHead)
        return head.head(hidden)

    def _processed(self, logits: Tensor) -> Tensor:
        """Scores (A, V) as the base's own generation settings leave them: processors know the texts by their place."""
        if not self._process:
            return logits
        scores = logits.new_zeros(len(self._begun), logits.shape[1], dtype=torch.float32)
        scores[self._open] = logits.float()
        ids: Any = torch.cat([self._begun, self._written[:, : self._steps]], 1)
        return self._process(ids, scores)[self._open]  # pyright: ignore[reportArgumentType]

    def _append(self, tokens: Tensor) -> None:
        """Adds tokens (A,) to the open texts and reads them."""
        self._written[self._open, self._steps] = tokens
        self._steps += 1
        self._tokens[self._open] = self._steps
        ended = torch.isin(tokens, self._engine.ends)
        if self._steps == self._decoding.max_new_tokens:
            ended = torch.ones_like(ended)
        if bool(ended.any()):
            tokens = tokens[self._close(ended)]
        if len(self._open):
            self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], 1)
            self._hidden = self._reader.read_tokens(
                tokens[:, None], self._mask, self._positions, self._cache, self._open, self._active
            )
            self._positions = self._positions + 1

    def _close(self, ended: Tensor) -> Tensor:
        """Takes texts out of the batch: the last open ones move into their places. Returns which stay, in their new order."""
        count = int((~ended).sum())
        stay = torch.arange(count, device=ended.device)
        free = ended[:count].nonzero().flatten()
        stay[free] = (~ended[count:]).nonzero().flatten() + count
        width = len(self._active)
        for layer in _layers(self._cache):
            layer.move(policy_rows(stay[free], width), policy_rows(free, width), count * width)
        self._aside = {
            policy: [(keys[stay], values[stay]) for keys, values in layers] for policy, layers in self._aside.items()
        }
        self._open, self._weights = self._open[stay], self._weights[stay]
        self._mask, self._positions = self._mask[stay], self._positions[stay]
        if count:
            self._reader.load_source(self._cache, self._open, self._active)
        return stay

    def _activate(self, active: tuple[int, ...]) -> None:
        """Puts aside the keys and values of policies without weight; those that return read what they missed."""
        if active == self._active:
            return
        by_policy = {policy: (keys_and_values, self._hidden[:, i]) for i, (policy, keys_and_values) in enumerate(self._split())}
        for policy in set(self._active) - set(active):
            self._aside[policy] = [(keys.clone(), values.clone()) for keys, values in by_policy[policy][0]]
        for policy in set(active) - set(self._active):
            by_policy[policy] = self._caught_up(policy)
        together = [
            tuple(torch.stack(states, 1).flatten(0, 1) for states in zip(*layer, strict=True))
            for layer in zip(*(by_policy[policy][0] for policy in active), strict=True)
        ]
        self._cache = self._filled(together, active)
        self._hidden = torch.stack([by_policy[policy][1] for policy in active], 1)
        self._active = active

    def _split(self) -> list[tuple[int, _Layers]]:
        """Keys and values (A, heads, T, D) by layer of each active policy."""
        layers = [
            tuple(states.unflatten(0, (-1, len(self._active))) for states in both) for both in _keys_and_values(self._cache)
        ]
        return [(policy, [(k[:, i], v[:, i]) for k, v in layers]) for i, policy in enumerate(self._active)]

    def _caught_up(self, policy: int) -> tuple[_Layers, Tensor]:
        """One prefill of what a policy missed: its keys and values by layer, and its hidden state (A, H)."""
        known = self._aside.pop(policy)
        cache = self._filled(known, (policy,))
        missed = self._mask.shape[1] - known[0][0].shape[2]
        tokens = self._written[self._open, self._steps - missed : self._steps]  # (A, missed)
        positions = self._positions - missed + torch.arange(missed, device=tokens.device)
        hidden = self._reader.read_tokens(tokens, self._mask, positions, cache, self._open, (policy,))
        return _keys_and_values(cache), hidden[:, 0]

    def _filled(self, layers: Sequence[Any], active: tuple[int, ...]) -> Cache:
        """A cache of `active` policies with these keys and values, and room for all that may be written."""
        cache = self._reader.new_cache(len(layers))
        for layer, (keys, values) in zip(_layers(cache), layers, strict=True):
            layer.load(self._room, keys, values)
        self._reader.load_source(cache, self._open, active)
        return cache


def _layers(cache: Cache) -> Sequence[RowLayer]:
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    return own.layers  # type: ignore[return-value]


def _keys_and_values(cache: Cache) -> _Layers:
    return [(layer.keys, layer.values) for layer in _layers(cache)]  # type: ignore[misc]  # all of them hold some
