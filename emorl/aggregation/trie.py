"""Greedy decoding of many weight vectors over the same prompts at once, as a trie.

A policy's hidden state depends on the prefix, not on the weights. So the rows that are computed are distinct prefixes;
all candidates at a prefix share the K policies' forward, and what a candidate does by itself is one weighted sum of K
logit rows. Where few candidates share a prefix, their hidden states are mixed first, which is as exact and needs fewer
head products. Prompts are read once, and every prefix is remembered: a later call (the next level of a grid) goes
through known prefixes without the model. Not in EMORL's code, which decodes 135 candidates one by one without a cache.

Tokens are those of `HiddenStateEnsemble.generate(do_sample=False)` with each candidate's weights alone, up to
rounding: in float32 they differ only where two tokens' logits tie within it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache
from transformers.generation import GenerationMode

from emorl.aggregation.ensemble import AdapterMixture, HiddenStateEnsemble, Weights
from emorl.aggregation.prefixes import UNKNOWN, Array, Choices, PrefixTree, Store, highest, undominated
from emorl.aggregation.reading import CausalReader, Seq2SeqReader
from emorl.aggregation.row_cache import RowLayer, has_only_attention
from emorl.aggregation.stacked_lora import AggregatingHead

_PROMPTS_AT_ONCE = 64
_SEQUENCES_AT_ONCE = 512  # more are hardly faster on a CPU, and their keys and values need memory
_LOGITS_AT_ONCE = 2**22  # elements: 16 MiB in float32, which stays in a cache


def plain_greedy(ensemble: AdapterMixture, generation: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `TrieDecoder` must know to decode as `ensemble.generate(**generation)` would, or None where that is more than
    greedy decoding: sampling, beams, penalties, suppressed tokens, stop strings, no `max_new_tokens`."""
    model: Any = ensemble  # generate() itself calls these two first
    config, others = model._prepare_generation_config(None, **generation)
    model._prepare_special_tokens(config, True, device="cpu")
    if others or config.max_new_tokens is None or config.get_generation_mode() != GenerationMode.GREEDY_SEARCH:
        return None
    if config.stop_strings or config.max_time or config.cache_implementation:
        return None
    if not has_only_attention(ensemble.config.get_text_config(decoder=True)):
        return None
    if any(name.endswith("final_logits_bias") for name, _ in ensemble.named_buffers()):
        return None  # BART: a bias behind the head, and positions that count from the start of a cache
    if model._get_logits_processor(config, input_ids_seq_length=1, device="cpu", model_kwargs={}):
        return None
    end, pad = config._eos_token_tensor, config._pad_token_tensor
    return {
        "max_new_tokens": config.max_new_tokens,
        "eos_token_id": None if end is None else end.flatten().tolist(),
        "pad_token_id": 0 if pad is None else int(pad),
    }


@dataclass
class TrieWork:
    """What was computed so far: `rows` are prefixes that went through the model (once for all policies), `tokens` the
    tokens that were asked for, `head` the products of one hidden state with the head."""

    rows: int = 0
    tokens: int = 0
    head: int = 0


@dataclass
class _Sequences:
    """The sequences being decoded, one per candidate and prompt (E of them)."""

    weights: Array  # (E, K), and 1 for the head's bias where there is one
    node: Array  # (E,) the deepest known prefix
    tokens: Array  # (E, T) what is decoded, the pad token behind it
    known: Array  # (E,) how many tokens are decoded


@dataclass
class _Rows:
    """The rows of one round, in the order of the cache (R of them)."""

    root: Array  # (R,) the prompt
    node: Array  # (R,) the deepest prefix of the row that is stored
    depth: Array  # (R,) decoded tokens in the cache
    start: Array  # (R,) place of the prompt's first token: rows are aligned right
    token: Array  # (R,) to be read next
    row_of: Array = field(default_factory=lambda: np.empty(0, np.int64))  # (E',) of each sequence of the round


class TrieDecoder:
    """Decodes any number of weight vectors greedily over fixed prompts.

    decoder = TrieDecoder(ensemble, **inputs, max_new_tokens=64)  # inputs of a tokenizer that pads on the left
    decoder.decode(torch.tensor([[0.5, 0.5], [0.9, 0.1]]))  # (2, prompts, 64) tokens

    """

    def __init__(
        self,
        ensemble: HiddenStateEnsemble,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int = 0,
        memory: int | None = None,
    ) -> None:
        """Reads the prompts.

        Args:
            input_ids: prompts (P, S), padded on the left; of an encoder-decoder, the encoder's.
            eos_token_id: one or several tokens that end a sequence; None: nothing does.
            pad_token_id: what stands behind the end.
            memory: bytes for caches and remembered prefixes, besides the model; None: no limit. Under a limit the same
                tokens are found, in more rounds and with less remembered.

        Raises:
            ValueError: prompts padded on the right; memory that does not even hold the prompts and one row; a head that is
                no plain linear layer.
        """
        head = ensemble.policies.get_output_embeddings()
        assert isinstance(head, AggregatingHead)
        if not isinstance(head.head, nn.Linear) or not head.head.weight.is_floating_point():
            raise ValueError(f"The output head is a {type(head.head).__name__}; trie decoding needs a plain nn.Linear.")
        self._ensemble, self._head = ensemble, head.head
        self._max_new_tokens, self._pad = max_new_tokens, pad_token_id
        ends = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        self._ends = np.array(ends, np.int64)
        self._policies = len(ensemble.policy_names)
        self.work = TrieWork()
        reader = Seq2SeqReader if ensemble.config.is_encoder_decoder else CausalReader
        self._reader = reader(ensemble, input_ids, attention_mask)
        self._tree, self._choices = PrefixTree(len(input_ids)), Choices()
        self._choices.extend_to(len(input_ids))
        self._hidden = Store()  # of each node, (nodes, K, H)
        self._cache: Cache  # of the rows; one for all rounds, so that its memory is touched only once
        self._layers: list[tuple[Store, Store]] = []  # keys and values of each place, (places, K, heads, D)
        self._places = np.arange(0)  # of each node's last token
        self._next_place = 0
        self._most_rows, self._most_places = 2**31, 2**40
        self._prompt_places: list[Array] = []
        self._read_prompts(memory)

    @torch.no_grad()
    def decode(self, weights: Weights, prompts: Sequence[int] | None = None) -> Tensor:
        """New tokens (C, P, T) for weights (C, K) or C mappings by policy name, none negative; P counts `prompts` (all by
        default), T is max_new_tokens.

        Raises:
            ValueError: weights of another shape, negative, not finite, or all zero; prompts that are not there.
        """
        weights = torch.as_tensor(self._ensemble.in_order(weights), dtype=torch.float32)
        self._check(weights)
        known = len(self._prompt_places)
        chosen = np.arange(known) if prompts is None else np.array(prompts, np.int64)
        if len(chosen) == 0 or chosen.min() < 0 or chosen.max() >= known:
            raise ValueError(f"Got prompts {chosen.tolist()}; expected at least one of 0 to {known - 1}.")
        candidates = weights.detach().cpu().numpy()
        size = max(1, _SEQUENCES_AT_ONCE // len(candidates))
        parts = [self._decode(candidates, chosen[start : start + size]) for start in range(0, len(chosen), size)]
        return torch.from_numpy(np.concatenate(parts, 1))

    def _decode(self, candidates: Array, prompts: Array) -> Array:
        """Tokens (C, P, T) of prompts that are decoded together."""
        if self._head.bias is not None:
            candidates = np.concatenate([candidates, np.ones((len(candidates), 1), np.float32)], 1)
        sequences = _Sequences(
            weights=np.repeat(candidates, len(prompts), 0),
            node=np.tile(prompts, len(candidates)),
            tokens=np.full((len(candidates) * len(prompts), self._max_new_tokens), self._pad),
            known=np.zeros(len(candidates) * len(prompts), np.int64),
        )
        waiting = self._walk(sequences, np.arange(len(sequences.node)))
        while len(waiting):
            waiting = self._walk(sequences, self._round(sequences, waiting))
        self.work.tokens += int(sequences.known.sum())
        return sequences.tokens.reshape(len(candidates), len(prompts), -1)

    def _check(self, weights: Tensor) -> None:
        if weights.ndim != 2 or weights.shape[1] != self._policies or len(weights) == 0:
            raise ValueError(f"Got weights of shape {tuple(weights.shape)}; expected (candidates, {self._policies}).")
        if not bool(weights.isfinite().all()) or bool((weights < 0).any()) or bool((weights == 0).all(1).any()):
            raise ValueError(
                "Got weights that are negative, not finite or all zero; generate() decodes negative ones of an ensemble made "
                "with include_base=True."
            )

    @torch.no_grad()
    def _read_prompts(self, memory: int | None) -> None:
        """Puts the prompts' keys, values and last hidden states into the stores."""
        lengths = self._reader.mask.sum(1).tolist()
        ends = np.cumsum(lengths)
        self._prompt_places = [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        self._places = ends - 1
        for start in range(0, len(lengths), _PROMPTS_AT_ONCE):
            layers, mask, hidden = self._reader.read_prompts(slice(start, start + _PROMPTS_AT_ONCE))
            if start == 0:
                self._layers = [(Store(), Store()) for _ in layers]
                self._cache = self._reader.new_cache(len(layers))
                self._set_limits(memory, layers, hidden, max(lengths), int(ends[-1]))
            prompt, place = mask.nonzero(as_tuple=True)
            for (keys, values), layer in zip(self._layers, layers, strict=True):
                for store, states in ((keys, layer.keys), (values, layer.values)):
                    assert states is not None
                    by_token = states.unflatten(0, (-1, self._policies)).permute(0, 3, 1, 2, 4)  # (P, S, K, heads, D)
                    store.write(self._next_place, by_token[prompt.to(states.device), place.to(states.device)])
            self._hidden.write(start, hidden)
            self._next_place += len(prompt)

    def _set_limits(self, memory: int | None, layers: list[RowLayer], hidden: Tensor, longest: int, tokens: int) -> None:
        """How many rows are decoded at once, and how many token places are stored, with half of the memory each."""
        if memory is None:
            return
        per_place = hidden[0].nbytes  # of all policies
        for layer in layers:
            assert layer.keys is not None
            assert layer.values is not None
            per_place += (layer.keys[0, :, 0].nbytes + layer.values[0, :, 0].nbytes) * self._policies
        source = sum(keys[0].nbytes + values[0].nbytes for keys, values in self._reader.across)
        per_row = (longest + 2 * self._max_new_tokens) * per_place + source  # a row may begin far to the right
        self._most_rows, self._most_places = memory // 2 // per_row, memory // 2 // per_place
        if self._most_rows < 1 or self._most_places < tokens:
            needed = 2 * max(per_row, per_place * tokens)
            raise ValueError(f"{memory} bytes of memory do not hold these prompts; expected at least {needed}.")

    # Where weights lead: through known prefixes without the model.

    def _walk(self, sequences: _Sequences, waiting: Array) -> Array:
        """Follows the known prefixes as far as they go; the sequences that then need the model."""
        unknown = [waiting[:0]]
        while len(waiting):
            self._choose(sequences, waiting, sequences.node[waiting])
            waiting = self._not_ended(sequences, waiting)
            node = sequences.node[waiting]
            children = self._tree.children(node, sequences.tokens[waiting, self._tree.depth(node)])
            unknown.append(waiting[children == UNKNOWN])
            waiting, children = waiting[children != UNKNOWN], children[children != UNKNOWN]
            sequences.node[waiting] = children
        return np.concatenate(unknown)

    def _choose(self, sequences: _Sequences, which: Array, nodes: Array) -> None:
        """The next token of sequences at stored prefixes, where it is not known already."""
        new = self._tree.depth(nodes) == sequences.known[which]
        which, nodes = which[new], nodes[new]
        if len(which):
            self._open(np.unique(nodes))
            self._append(sequences, which, self._choices.choose(nodes, sequences.weights[which]))

    def _open(self, nodes: Array) -> None:
        nodes = nodes[~self._choices.is_open(nodes)]
        for part in self._in_parts(nodes, self._policies):
            hidden = self._hidden[torch.from_numpy(part).to(self._ensemble.device)]
            self._choices.open(part, undominated(self._logits_by_policy(hidden)))

    def _logits_by_policy(self, hidden: Tensor) -> Tensor:
        """Logits (N, K, V) of hidden (N, K, H), with the head's bias as one more policy."""
        self.work.head += hidden.shape[0] * hidden.shape[1]
        with align_module_device(self._head):  # it may be offloaded
            logits = nn.functional.linear(hidden, self._head.weight)
            if self._head.bias is None:
                return logits
            return torch.cat([logits, self._head.bias.expand(len(logits), 1, -1)], 1)

    def _append(self, sequences: _Sequences, which: Array, tokens: Array) -> None:
        sequences.tokens[which, sequences.known[which]] = tokens
        sequences.known[which] += 1

    def _not_ended(self, sequences: _Sequences, which: Array) -> Array:
        """Those that go on: neither an end token nor the most tokens reached."""
        last = sequences.tokens[which, sequences.known[which] - 1]
        return which[~np.isin(last, self._ends) & (sequences.known[which] < self._max_new_tokens)]

    def _in_parts(self, items: Array, heads: int) -> list[Array]:
        """Items in parts whose logits, `heads` rows each, stay small."""
        size = max(1, _LOGITS_AT_ONCE // (heads * self._head.out_features))
        return [items[start : start + size] for start in range(0, len(items), size)]

    # Where no known prefix leads on: rounds of rows through the model.

    def _round(self, sequences: _Sequences, waiting: Array) -> Array:
        """Decodes as many distinct prefixes as there may be rows; the sequences that are left over."""
        node = sequences.node[waiting]
        keys = node * self._head.out_features + sequences.tokens[waiting, self._tree.depth(node)]
        distinct, row_of = np.unique(keys, return_inverse=True)
        left = [waiting[row_of >= self._most_rows]]
        here, row_of = waiting[row_of < self._most_rows], row_of[row_of < self._most_rows]
        distinct = distinct[: self._most_rows]
        most = min(self._most_rows, len(here))  # each row serves some sequence
        rows = self._load_rows(distinct // self._head.out_features, distinct % self._head.out_features, most)
        rows.row_of = row_of
        while len(here):
            hidden = self._read_tokens(rows)  # (R, K, H)
            self._choose_in_rows(sequences, here, rows, hidden)
            going = np.isin(here, self._not_ended(sequences, here))
            here, rows.row_of = here[going], rows.row_of[going]
            sequences.node[here] = rows.node[rows.row_of]
            here, surplus = self._split(sequences, here, rows)
            left.append(surplus)
        return np.concatenate(left)

    def _load_rows(self, nodes: Array, tokens: Array, most: int) -> _Rows:
        """Rows that hold the stored prefixes `nodes` and are about to read `tokens`; they may become `most`."""
        paths, roots = self._tree.paths(nodes)
        depth = self._tree.depth(nodes).astype(np.int64)
        lengths = np.array([len(self._prompt_places[root]) for root in roots]) + depth
        longest = int(lengths.max())
        places = np.zeros((len(nodes), longest), np.int64)  # what is not written here is masked
        for row, (root, deep, length) in enumerate(zip(roots, depth, lengths, strict=True)):
            places[row, longest - length : longest - deep] = self._prompt_places[root]
            places[row, longest - deep :] = self._places[paths[row, paths.shape[1] - deep :]]
        self._reader.load_source(self._cache, torch.from_numpy(roots).to(self._ensemble.device))
        index = torch.from_numpy(places).to(self._ensemble.device)
        for layer, stores in zip(_self_attention(self._cache), self._layers, strict=True):
            keys, values = (store[index].permute(0, 2, 3, 1, 4).flatten(0, 1) for store in stores)  # (R*K, heads, L, D)
            layer.load(longest + self._max_new_tokens, keys, values, most * self._policies)
        return _Rows(roots, nodes, depth, longest - lengths, tokens)

    def _read_tokens(self, rows: _Rows) -> Tensor:
        """One forward: last hidden states (R, K, H) after each row's token; stores the prefixes if there is room."""
        device, count = self._ensemble.device, len(rows.token)
        place = self._cache.get_seq_length()
        mask = torch.from_numpy(np.arange(place + 1) >= rows.start[:, None]).to(device)
        hidden = self._reader.read_tokens(
            torch.from_numpy(rows.token)[:, None].to(device),
            mask.long(),
            torch.from_numpy(place - rows.start)[:, None].to(device),
            self._cache,
            torch.from_numpy(rows.root).to(device),
        )
        self.work.rows += count
        stored = self._tree.depth(rows.node) == rows.depth  # the row's whole prefix is in the stores
        room = max(0, self._most_places - self._next_place)
        new = np.flatnonzero(stored)[:room]
        if len(new):
            self._store(rows, new, hidden)
        rows.depth = rows.depth + 1
        return hidden

    def _store(self, rows: _Rows, new: Array, hidden: Tensor) -> None:
        """Makes nodes of the rows `new`, with the keys and values of the token just read."""
        index = torch.from_numpy(new).to(hidden.device)
        for layer, (keys, values) in zip(_self_attention(self._cache), self._layers, strict=True):
            for store, states in ((keys, layer.keys), (values, layer.values)):
                assert states is not None
                by_row = states[:, :, -1].unflatten(0, (-1, self._policies))  # (R, K, heads, D)
                is_all = len(new) == len(by_row)
                store.write(self._next_place, by_row if is_all else by_row.index_select(0, index.to(by_row.device)))
        nodes = self._tree.add(rows.node[new], rows.token[new])
        self._hidden.write(int(nodes[0]), hidden[index])
        self._choices.extend_to(len(self._tree))
        self._places = np.concatenate([self._places, np.arange(self._next_place, self._next_place + len(new))])
        self._next_place += len(new)
        rows.node = rows.node.copy()
        rows.node[new] = nodes

    def _choose_in_rows(self, sequences: _Sequences, here: Array, rows: _Rows, hidden: Tensor) -> None:
        """The next token of each sequence of the round. Rows with several sequences are opened, the others mixed."""
        new = sequences.known[here] == rows.depth[rows.row_of]
        which, row_of = here[new], rows.row_of[new]
        sharing = np.bincount(row_of, minlength=len(rows.token))
        stored = self._tree.depth(rows.node) == rows.depth
        opened = (stored & (sharing >= self._policies))[row_of]
        if opened.any():
            self._choose(sequences, which[opened], rows.node[row_of[opened]])
        which, row_of = which[~opened], row_of[~opened]
        for part in self._in_parts(np.arange(len(which)), 1):
            index = torch.from_numpy(row_of[part]).to(hidden.device)
            weights = torch.from_numpy(sequences.weights[which[part], : self._policies]).to(hidden.device)
            mixed = torch.einsum("ekh,ek->eh", hidden[index].float(), weights).to(hidden.dtype)
            self.work.head += len(part)
            self._append(sequences, which[part], highest(self._head(mixed)).cpu().numpy())

    def _split(self, sequences: _Sequences, here: Array, rows: _Rows) -> tuple[Array, Array]:
        """One row for each distinct next token of each row; the sequences that have one, and those in surplus rows.

        A row's first token stays where the row is; only further tokens, and rows from behind the new end, are copied.
        """
        keys = rows.row_of * self._head.out_features + sequences.tokens[here, rows.depth[rows.row_of]]
        distinct, group_of = np.unique(keys, return_inverse=True)
        surplus = here[group_of >= self._most_rows]
        here, group_of = here[group_of < self._most_rows], group_of[group_of < self._most_rows]
        distinct = distinct[: self._most_rows]
        origin, token = distinct // self._head.out_features, distinct % self._head.out_features
        if len(distinct) == 0:
            return here, surplus
        target = np.full(len(distinct), UNKNOWN)
        _, first = np.unique(origin, return_index=True)
        stays = first[origin[first] < len(distinct)]
        target[stays] = origin[stays]
        target[target == UNKNOWN] = np.setdiff1d(np.arange(len(distinct)), target)
        moved = np.flatnonzero(target != origin)
        self._move(origin[moved], target[moved], len(distinct))
        order = np.argsort(target)
        source = origin[order]
        rows.root, rows.node, rows.depth, rows.start = (
            values[source] for values in (rows.root, rows.node, rows.depth, rows.start)
        )
        rows.token, rows.row_of = token[order], target[group_of]
        return here, surplus

    def _move(self, source: Array, target: Array, rows: int) -> None:
        device = self._ensemble.device
        lanes = np.arange(self._policies)
        from_rows, to_rows = (
            torch.from_numpy((rows_of[:, None] * self._policies + lanes).ravel()).to(device) for rows_of in (source, target)
        )
        for layer in [*_self_attention(self._cache), *_cross_attention(self._cache)]:
            layer.move(from_rows, to_rows, rows * self._policies)


def _self_attention(cache: Cache) -> list[RowLayer]:
    inner = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    return inner.layers  # type: ignore[return-value]


def _cross_attention(cache: Cache) -> list[RowLayer]:
    return cache.cross_attention_cache.layers if isinstance(cache, EncoderDecoderCache) else []  # type: ignore[return-value]
