"""One of several models that write together, as it reads the texts of a batch and keeps what it has read."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emorl.aggregation.row_cache import RowCache, has_only_attention, has_only_full_attention
from emorl.dynamic.engines.engine import Decoding
from emorl.dynamic.engines.settings import check_settings, processors_of, say_sampling
from emorl.dynamic.engines.vocabulary import Transcript

_NEEDED_ARGUMENTS = ("attention_mask", "position_ids", "past_key_values", "logits_to_keep")


class Reader:
    """One model that reads texts: the rows of its batch are those it is run for, the keys and values of others lie aside.

    Rows differ in length, and what is read again replaces what was read: a mask (R, S) says which places of the cache hold
    a row's tokens, positions are counted by row.
    """

    def __init__(self, name: str, model: PreTrainedModel, transcripts: Sequence[Transcript], decoding: Decoding) -> None:
        """Nothing is read yet. `transcripts` may grow between calls."""
        self._model, self.transcripts = model, transcripts
        config = model.config.get_text_config()
        self._room = getattr(config, "max_position_embeddings", None)
        for row in range(len(transcripts)):
            if self.is_full(row) or not transcripts[row].ids:
                raise ValueError(
                    f"Prompt {row} has {len(transcripts[row].ids)} tokens for model {name!r}; expected 1 to {self._room}."
                )
        self._has_windows = not has_only_full_attention(config)
        say_sampling(f"model {name!r}", model, decoding)
        prompts = [torch.tensor([transcript.ids], device=model.device) for transcript in transcripts]
        self._processors = [processors_of(model, decoding, prompt, None) for prompt in prompts]
        self.logits = torch.zeros(len(transcripts), config.vocab_size, device=model.device)  # (B, V) of the next token
        self.states = torch.zeros(len(transcripts), config.hidden_size, device=model.device)  # (B, H) where texts end
        self._rows: list[int] = []
        self._held = torch.zeros(0, 0, dtype=torch.bool)  # (R, S)
        self._cache = RowCache()
        self._aside: dict[int, list[tuple[Tensor, Tensor]]] = {}  # row -> keys and values (heads, T, D) by layer

    def is_full(self, row: int) -> bool:
        """Whether a text is longer than the model's context."""
        return self._room is not None and len(self.transcripts[row].ids) > self._room

    def open(self, rows: list[int]) -> None:
        """Makes `rows` the batch, in one piece."""
        if rows != self._rows or self._held.shape[1] > 2 * max(self._held.sum(1).tolist(), default=0):
            self._pack(rows)

    def _pack(self, rows: list[int]) -> None:
        """Makes `rows` the batch, whose tokens in the cache end at its last place, without gaps."""
        for place, row in enumerate(self._rows):
            held = self._held[place].to(self._model.device)
            self._aside[row] = [(layer.keys[place][:, held], layer.values[place][:, held]) for layer in self._cache.layers]  # type: ignore
        self._cache, self._rows = RowCache(), rows
        known = [self._aside.pop(row, []) for row in rows]
        lengths = torch.tensor([layers[0][0].shape[1] if layers else 0 for layers in known], dtype=torch.long)
        longest = int(lengths.max()) if rows else 0
        self._held = torch.arange(longest) >= longest - lengths[:, None]
        for layer in range(max(map(len, known), default=0)):  # every row has all layers, or none has been read
            keys, values = (
                pad_sequence([layers[layer][i].transpose(0, 1) for layers in known], True, padding_side="left").transpose(1, 2)
                for i in range(2)
            )
            self._cache.update(keys, values, layer)

    def close(self, rows: list[int]) -> None:
        """Forgets texts for ever."""
        for row in rows:
            self._aside.pop(row, None)
        keep = [place for place, row in enumerate(self._rows) if row not in rows]
        if len(keep) < len(self._rows):
            self._cache.batch_select_indices(torch.tensor(keep, dtype=torch.long, device=self._model.device))
            self._rows, self._held = [self._rows[place] for place in keep], self._held[keep]

    def read(self, rows: list[int]) -> None:
        """Reads what is new in some texts of the batch: `logits` of theirs are those after their last tokens then."""
        behind = [row for row in rows if self.transcripts[row].read < len(self.transcripts[row].ids)]
        if not behind:
            return
        chunks, kept = self._chunks(behind)
        order = self._held.cumsum(1)  # (R, S), from 1 within a row's tokens
        if self._has_windows and bool((kept < self._held.sum(1)).any()):
            self._held &= order <= kept[:, None]
            self._pack(self._rows)
            order = self._held.cumsum(1)
        new = pad_sequence([torch.ones(len(chunk)) for chunk in chunks], True, padding_side="left").bool()  # (R, N)
        ids = pad_sequence([torch.tensor(chunk, dtype=torch.long) for chunk in chunks], True, padding_side="left")
        self._held = torch.cat([self._held & (order <= kept[:, None]), new], 1)
        positions = (kept[:, None] + new.cumsum(1) - 1).clamp_min(0)
        device = self._model.device
        found = self._model(
            input_ids=ids.to(device),
            attention_mask=self._held.long().to(device),
            position_ids=positions.to(device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            output_hidden_states=True,
        )
        places = [self._rows.index(row) for row in behind]
        self.logits[behind] = found.logits[:, -1][places].float()
        self.states[behind] = found.hidden_states[-1][:, -1][places].float()
        if self._held.shape[1] > 2 * max(len(self.transcripts[row].ids) for row in self._rows):
            self.open(self._rows)

    def _chunks(self, behind: list[int]) -> tuple[list[list[int]], Tensor]:
        """Of each row of the batch the tokens to be read, and how many of those in the cache stay, (R,).

        A window is counted in places, so a row may have no gaps there: all rows read equally many tokens, known ones again.
        """
        transcripts = [self.transcripts[row] for row in self._rows]
        most = max(len(self.transcripts[row].ids) - self.transcripts[row].read for row in behind)
        chunks, kept = [], self._held.sum(1)
        for place, (row, transcript) in enumerate(zip(self._rows, transcripts, strict=True)):
            start, end = transcript.read, len(transcript.ids) if row in behind else transcript.read
            if self._has_windows:
                start = max(0, end - most)
            chunks.append(transcript.ids[start:end])
            if self._has_windows or row in behind:
                kept[place], transcript.read = start, end
        return chunks, kept

    def processed(self, rows: list[int], logits: Tensor) -> Tensor:
        """Logits (A, V) of some texts, as the model's own generation settings leave them."""
        if not any(self._processors):
            return logits
        ids = [torch.tensor([self.transcripts[row].ids], device=logits.device) for row in rows]
        parts = [self._processors[row](ids[place], logits[place, None]) for place, row in enumerate(rows)]  # pyright: ignore
        return torch.cat(parts)  # pyright: ignore[reportArgumentType, reportCallIssue]


def check_reader(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses models whose cache cannot be kept by row, and tokenizers that are not theirs."""
    config = model.config.get_text_config()
    arguments = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder or any(argument not in arguments for argument in _NEEDED_ARGUMENTS):
        raise ValueError(
            f"Model {name!r} is a {type(model).__name__}; different models write together as decoders with a cache."
        )
    if not has_only_attention(config) or "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(
            f"Model {name!r} is a {config.model_type} whose layers keep a state or see tokens in chunks; expected full or "
            "sliding-window attention."
        )
    check_settings(f"model {name!r}", model)
    most = max(tokenizer.get_vocab().values())
    if most >= config.vocab_size:
        raise ValueError(f"Model {name!r} has {config.vocab_size} tokens and its tokenizer more: {most + 1}; is it its own?")
