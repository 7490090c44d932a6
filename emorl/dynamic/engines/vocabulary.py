"""What the tokens of different tokenizers have in common: the bytes they add to a text.

The union vocabulary is that of GaC (arXiv 2406.12585) and RLAE (2506.00439), whose mapping matrices are index tensors here.
Departures: tokens are compared as bytes, so that scripts other than Latin meet too, and special tokens that end no text get
probability 0 before the softmax, as they are no part of a text. A model reads what another one wrote from the start of the
last word on in its own tokenization, where the authors' code tokenizes all text again and drops the key-value cache.
"""

import codecs
import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_INVALID_BYTE = re.compile("([\udc80-\udcff])")  # as str.decode("surrogateescape") shows them
_LONGEST_WORD = 32  # bytes; scripts without spaces are cut into such pieces


def token_bytes(tokenizer: PreTrainedTokenizerBase, size: int) -> list[bytes | None]:
    """The bytes that each of `size` token ids adds to a text; None for special tokens and ids beyond the vocabulary.

    Args:
        size: rows of the model's output, its config's vocab_size; padding may make it larger than the tokenizer.

    Raises:
        ValueError: the tokenizer is neither byte-level nor of SentencePiece's kind.
    """
    return Spelling(tokenizer, size).token_bytes


def is_complete(data: bytes) -> bool:
    """Whether bytes end where a UTF-8 character does; invalid bytes count as ended."""
    return not _unfinished(data)


def _unfinished(data: bytes) -> bytes:
    """The bytes at the end that begin a UTF-8 character."""
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    decoder.decode(data[-4:])
    return decoder.getstate()[0]


class Spelling:
    """How one tokenizer writes bytes as tokens.

    >>> spelling = Spelling(tokenizer, model.config.vocab_size)
    >>> spelling.encode(b" Hello")  # as the continuation of a text: no start token, no space put in front
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} is written in Python; expected a tokenizer of the tokenizers library."
            )
        backend: Any = tokenizer.backend_tokenizer
        state = json.loads(backend.to_str())
        decoders = list(_flat(state["decoder"], "decoders"))
        kinds = {decoder["type"] for decoder in decoders}
        self._space = next(filter(None, map(_space, decoders)), None)  # SentencePiece's sign for a space
        suffixes = state["model"].get("continuing_subword_prefix") or state["model"].get("end_of_word_suffix")
        known = "ByteLevel" in kinds or self._space is not None
        if state["model"]["type"] not in ("BPE", "Unigram") or suffixes or not known:
            raise ValueError(
                f"{tokenizer.name_or_path or type(tokenizer).__name__}: a tokenizer of model {state['model']['type']!r} and "
                f"decoder {sorted(kinds)} cannot be read as bytes; expected byte-level BPE or SentencePiece."
            )
        self._byte_level, self._byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        self._model, self._splitter = backend.model, backend.pre_tokenizer
        self._unknown = [] if tokenizer.unk_token_id is None else [tokenizer.unk_token_id]
        added = backend.get_added_tokens_decoder()
        special = {id_ for id_, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        self.token_bytes: list[bytes | None] = [None] * size
        self._byte_ids: dict[int, int] = {}  # byte -> its own token, of SentencePiece's byte fallback
        for token, id_ in backend.get_vocab(with_added_tokens=True).items():
            if id_ < size and id_ not in special:
                self.token_bytes[id_] = self._bytes_of(token, id_, id_ in added) or None
        self.id_of: dict[bytes, int] = {}  # a letter's own token goes before its byte token
        last = set(self._byte_ids.values())
        for id_, data in sorted(enumerate(self.token_bytes), key=lambda item: item[0] in last):
            if data is not None:
                self.id_of.setdefault(data, id_)

    def _bytes_of(self, token: str, id_: int, added: bool) -> bytes:
        if self._byte_level:
            values = [_byte_of().get(character) for character in token]
            return token.encode() if added or None in values else bytes(value for value in values if value is not None)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            value = int(match[1], 16)
            self._byte_ids[value] = id_
            return bytes([value])
        assert self._space is not None
        return token.replace(self._space, " ").encode()

    def encode(self, data: bytes) -> list[int]:
        """Token ids of bytes that go on with a text. What has no token, even byte by byte, becomes the unknown token.

        The normalizer is left out: it would put spaces in front, or change what was written.
        """
        if self._byte_level:
            ids = [id_ for piece in self._byte_level_pieces(data) for id_ in self._ids(piece)]
        else:
            assert self._space is not None
            ids = []
            for part in _INVALID_BYTE.split(data.decode("utf-8", "surrogateescape")):
                if _INVALID_BYTE.fullmatch(part):
                    value = ord(part) - 0xDC00
                    ids += [self._byte_ids[value]] if value in self._byte_ids else self._unknown
                elif part:
                    ids += self._ids(part.replace(" ", self._space))
        return ids

    def _ids(self, piece: str) -> list[int]:
        return [token.id for token in self._model.tokenize(piece)]

    def _byte_level_pieces(self, data: bytes) -> list[str]:
        """Bytes in the byte-level alphabet, cut where the tokenizer cuts before it merges."""
        whole = "".join(_character_of()[value] for value in data)
        if self._splitter is None:
            return [whole]
        try:
            pieces = [piece for piece, _ in self._splitter.pre_tokenize_str(data.decode())]
        except UnicodeDecodeError:  # within a character
            return [whole]
        return pieces if "".join(pieces) == whole else [whole]  # a pre-tokenizer may put a space in front


class Transcript:
    """A text as token ids of one model, for which strings are added that it has as tokens or not.

    A string that is one token of the model is added as that token: a model that writes alone sees what it wrote. From the
    first other string in a word on, or a character that came byte by byte though the model has a token for it, the whole
    word is tokenized again with every string, so that the model sees the tokens it was trained on ("▁Hello", not "▁H", "el",
    "lo"), and its key-value cache stays good up to the word. This depends on the strings alone, not on spans.
    """

    def __init__(self, spelling: Spelling, prompt: Sequence[int]) -> None:
        self._spelling = spelling
        self.ids = list(prompt)
        self.read = 0  # leading ids that the model read and that have not changed since; kept by who reads
        self._word, self._start, self._foreign = b"", len(self.ids), False

    def append(self, string: bytes) -> None:
        """Adds a string; `read` goes down to where ids changed, and below all of them."""
        full = string[:1].isspace() or len(self._word) >= _LONGEST_WORD
        if full and is_complete(self._word):
            self._word, self._start, self._foreign = b"", len(self.ids), False
        self._word += string
        own = self._spelling.id_of.get(string)
        self._foreign = self._foreign or own is None or self._is_spelled_out(string)
        if self._foreign:
            ids = self._spelling.encode(self._word)
            pairs = zip(self.ids[self._start :], ids, strict=False)
            same = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self.ids) - self._start, len(ids)))
            self.ids[self._start :] = ids
            self.read = min(self.read, self._start + same)
        elif own is not None:
            self.ids.append(own)
        self.read = min(self.read, len(self.ids) - 1)

    def _is_spelled_out(self, string: bytes) -> bool:
        """Whether a string ends a character that was begun before it, and that has a token of its own."""
        begun = _unfinished(self._word[: -len(string)])
        character = (begun + string).decode("utf-8", "surrogateescape")[:1].encode("utf-8", "surrogateescape")
        return bool(begun) and len(character) > 1 and character in self._spelling.id_of


class UnionVocabulary:
    """The byte strings of several tokenizers' tokens, each once: U of them, the first of which ends a text.

    >>> union = UnionVocabulary([first, second], sizes=[32000, 50257], ends=[[2], [50256]])
    >>> union.probabilities(1, logits_of_second)  # (B, 50257) -> (B, U), rows sum to 1
    """

    END = 0

    def __init__(
        self, tokenizers: Sequence[PreTrainedTokenizerBase], sizes: Sequence[int], ends: Sequence[Sequence[int]]
    ) -> None:
        """`sizes` are the models' numbers of logits, `ends` the ids that end a text, which are one string here."""
        self.spellings = [Spelling(tokenizer, size) for tokenizer, size in zip(tokenizers, sizes, strict=True)]
        self.strings: list[bytes] = [b""]
        number: dict[bytes, int] = {}
        self._index, self._suppressed = [], []
        for spelling, end_ids in zip(self.spellings, ends, strict=True):
            index, suppressed = [], []
            for id_, data in enumerate(spelling.token_bytes):
                end = id_ in end_ids
                suppressed.append(data is None and not end)
                if data is None or end:
                    index.append(self.END)
                    continue
                if data not in number:
                    number[data] = len(self.strings)
                    self.strings.append(data)
                index.append(number[data])
            self._index.append(torch.tensor(index))
            self._suppressed.append(torch.tensor(suppressed))
        self._number = number

    def __len__(self) -> int:
        return len(self.strings)

    def writable(self, model: int, logits: Tensor) -> Tensor:
        """A model's logits (B, V) in float32, -inf where a token is no string, as special tokens but the end are."""
        self._suppressed[model] = self._suppressed[model].to(logits.device)
        return logits.float().masked_fill(self._suppressed[model], -torch.inf)

    def probabilities(self, model: int, logits: Tensor) -> Tensor:
        """A model's distribution over the union, (B, U) in float32, for its logits (B, V)."""
        own = self.writable(model, logits).softmax(-1)
        self._index[model] = self._index[model].to(logits.device)
        return own.new_zeros(len(own), len(self)).index_add_(1, self._index[model], own)

    def first_tokens(self, model: int) -> Tensor:
        """For each string the number of a model's first token of it, the string itself where that is one; -1 where the model
        has no token to begin it. (U,) of long."""
        spelling, own = self.spellings[model], set(self._index[model][~self._suppressed[model]].tolist())
        first = []
        for number, data in enumerate(self.strings):
            if number in own or number == self.END:
                first.append(number)
                continue
            start = next(iter(spelling.encode(data)), None)
            known = start is not None and start < len(spelling.token_bytes) and spelling.token_bytes[start] is not None
            first.append(int(self._index[model][start]) if known else -1)
        return torch.tensor(first)


def _flat(state: dict[str, Any] | None, parts: str) -> Iterator[dict[str, Any]]:
    """A tokenizer's decoder, or all that a sequence holds."""
    if state is not None and state["type"] == "Sequence":
        for part in state[parts]:
            yield from _flat(part, parts)
    elif state is not None:
        yield state


def _space(decoder: dict[str, Any]) -> str | None:
    """What a decoder replaces by a space."""
    if decoder["type"] == "Metaspace":
        return decoder["replacement"]
    if decoder["type"] == "Replace" and decoder["content"] == " ":
        return decoder["pattern"].get("String")
    return None


@functools.cache
def _character_of() -> dict[int, str]:
    """GPT-2's alphabet: printable bytes are themselves, the others follow behind the 256th character."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (value for value in range(256) if value not in printable)
    return {value: chr(value) for value in printable} | {value: chr(256 + place) for place, value in enumerate(others)}


@functools.cache
def _byte_of() -> dict[str, int]:
    return {character: value for value, character in _character_of().items()}
