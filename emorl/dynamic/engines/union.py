"""Different models with different tokenizers that write together: RLAE's setting (arXiv 2506.00439).

`top_k` mixes over the union of each model's most probable strings, as UniTE does (2410.03777): a string that a model has no
token for gets the probability of its first token there, which counts all else that begins so too; then each model's sum to 1.
`full` mixes over all strings, as GaC does (2406.12585), where such a string gets 0, so short ones that all models have are
favoured. Departures: strings are bytes, key-value caches are kept, texts have models and weights of their own in one batch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emorl.dynamic.engines.engine import SIGNALS, Decoding, check_weights, distribution_signals
from emorl.dynamic.engines.reader import Reader, check_reader
from emorl.dynamic.engines.sampling import choose, random_numbers
from emorl.dynamic.engines.vocabulary import Transcript, UnionVocabulary, is_complete
from emorl.policies.generation import end_tokens
from emorl.policies.prompts import is_chat, token_ids

VOCABULARIES = ("top_k", "full")
_FOR_A_CHARACTER = 3  # tokens that a span may be longer to end with a whole character


class UnionEngine:
    """An `Engine` of decoders that need share nothing.

    >>> engine = UnionEngine([first, second], [tokenizer_of_first, tokenizer_of_second], names=["first", "second"])
    >>> writing = engine.begin(["Hello"], Decoding(max_new_tokens=16))
    >>> writing.write(torch.tensor([[0.7, 0.3]]), span=8)
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        tokenizers: Sequence[PreTrainedTokenizerBase],
        names: Sequence[str],
        vocabulary: str = "top_k",
        top_k: int = 10,
    ) -> None:
        if not 0 < len(models) == len(tokenizers) == len(names) == len(set(names)):
            raise ValueError(
                f"Got {len(models)} models, {len(tokenizers)} tokenizers and names {list(names)}; expected one tokenizer and a "
                "name of its own for each model, and at least one model."
            )
        if vocabulary not in VOCABULARIES or top_k < 1:
            raise ValueError(f"Got vocabulary={vocabulary!r} and top_k={top_k}; expected one of {VOCABULARIES} and at least 1.")
        for name, model, tokenizer in zip(names, models, tokenizers, strict=True):
            check_reader(name, model, tokenizer)
        self.state_width = max(model.config.get_text_config().hidden_size for model in models)
        self.names, self.models, self.tokenizers = tuple(names), tuple(models), tuple(tokenizers)
        ends = [end_tokens(model, tokenizer) for model, tokenizer in zip(models, tokenizers, strict=True)]
        self.union = UnionVocabulary(tokenizers, [model.config.get_text_config().vocab_size for model in models], ends)
        self.device = models[0].device
        self.top_k = min(top_k, len(self.union)) if vocabulary == "top_k" else None
        self._firsts = [self.union.first_tokens(i).to(self.device) for i in range(len(models) if self.top_k else 0)]

    def begin(self, prompts: Sequence[Any], decoding: Decoding, seeds: Sequence[int] | None = None) -> "UnionWriting":
        """As `Engine.begin`. A text is one user turn for a model with a chat template; for one without, a conversation is
        what was said in it, a turn a line."""
        return UnionWriting(self, prompts, decoding, range(len(prompts)) if seeds is None else seeds)

    def candidates(self, distributions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Numbers of the strings to choose from, (A, C), and each model's distribution over them, (A, K, C), which sums to 1.

        Args:
            distributions: of every model over the union, (A, U); zeros where it is not to be run.
        """
        if self.top_k is None:
            numbers = torch.arange(len(self.union), device=self.device)
            return numbers.expand(len(distributions[0]), -1), torch.stack(list(distributions), 1)
        best = [own.topk(self.top_k, -1) for own in distributions]
        none = len(self.union)  # a number behind all others
        numbers = torch.cat([found.indices.where(found.values > 0, none) for found in best], -1).sort(-1).values  # (A, C)
        real = (numbers < none) & (numbers != numbers.roll(1, -1)).index_fill(1, numbers.new_zeros(1), True)
        numbers = numbers.where(real, 0)
        shares = []
        for own, first in zip(distributions, self._firsts, strict=True):
            begin = first[numbers].where(real, -1)  # (A, C)
            share = own.gather(1, begin.clamp_min(0)).where(begin >= 0, 0)
            shares.append(share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny))
        return numbers, torch.stack(shares, 1)


class UnionWriting:
    """A `Writing`. Every model has a batch of the texts for which its weight is above 0.

    A text also ends where the context of a model that is run for it is full.
    """

    @torch.no_grad()
    def __init__(self, engine: UnionEngine, prompts: Sequence[Any], decoding: Decoding, seeds: Sequence[int]) -> None:
        self._engine, self._decoding = engine, decoding
        self._readers = [
            Reader(
                name,
                model,
                [Transcript(spelling, _prompt_ids(tokenizer, prompt)) for prompt in prompts],
                decoding,
            )
            for name, model, tokenizer, spelling in zip(
                engine.names, engine.models, engine.tokenizers, engine.union.spellings, strict=True
            )
        ]
        self._data = [bytearray() for _ in prompts]
        self._tokens = [0] * len(prompts)
        self._finished = [False] * len(prompts)
        self._uniform = random_numbers(decoding, seeds)  # (B, max_new_tokens)
        self._signals = torch.zeros(len(prompts), len(engine.names), len(SIGNALS))
        everything = torch.ones(len(prompts), len(engine.names), dtype=torch.bool)
        self._open(everything)
        self._measure(everything)

    @property
    def signals(self) -> Tensor:
        """As `Writing.signals`; a finished text keeps those of the last end of a span before it finished."""
        return self._signals.clone()

    @property
    def states(self) -> Tensor:
        """As `Writing.states`."""
        width = self._engine.state_width
        return torch.stack([pad(reader.states, (0, width - reader.states.shape[1])).cpu() for reader in self._readers], 1)

    @property
    def finished(self) -> Tensor:
        """As `Writing.finished`."""
        return torch.tensor(self._finished)

    @property
    def texts(self) -> list[str]:
        """As `Writing.texts`."""
        return [data.decode(errors="ignore").strip() for data in self._data]

    @property
    def tokens(self) -> list[int]:
        """As `Writing.tokens`; of the union vocabulary."""
        return list(self._tokens)

    @torch.no_grad()
    def write(self, weights: Tensor, span: int) -> None:
        """As `Writing.write`; goes on for up to 3 tokens where a span would end within a character."""
        check_weights(weights, span, (len(self._data), len(self._engine.names)))
        weights = weights.to(self._engine.device, torch.float32)
        active = (weights > 0).cpu()  # (B, K)
        self._finished = [ended or self._is_full(row, active) for row, ended in enumerate(self._finished)]
        self._open(active)
        for count in range(span + _FOR_A_CHARACTER):
            rows = [
                row
                for row, data in enumerate(self._data)
                if not self._finished[row] and (count < span or not is_complete(bytes(data[-4:])))
            ]
            if not rows:
                break
            self._step(rows, weights, active)
        self._measure(active)

    def _open(self, active: Tensor) -> None:
        """Every model reads what it does not know yet of the texts it is run for."""
        for reader, wanted in zip(self._readers, active.T.tolist(), strict=True):
            rows = [row for row, run in enumerate(wanted) if run and not self._finished[row]]
            reader.open(rows)
            reader.read(rows)

    def _step(self, rows: list[int], weights: Tensor, active: Tensor) -> None:
        """One more token for some unfinished texts."""
        numbers, shares = self._shares(rows, active)
        mixed = torch.einsum("akc,ak->ac", shares, weights[rows])
        places = choose(mixed.log(), self._decoding, self._uniform[rows, [self._tokens[row] for row in rows]])  # (A,)
        for row, number in zip(rows, numbers.gather(1, places[:, None]).flatten().tolist(), strict=True):
            self._append(row, number)
            self._finished[row] = self._finished[row] or self._is_full(row, active)
        for reader, wanted in zip(self._readers, active.T.tolist(), strict=True):
            reader.close([row for row in rows if self._finished[row]])
            reader.read([row for row in rows if wanted[row] and not self._finished[row]])

    def _append(self, row: int, number: int) -> None:
        self._tokens[row] += 1
        self._finished[row] = number == UnionVocabulary.END or self._tokens[row] == self._decoding.max_new_tokens
        if number != UnionVocabulary.END:
            string = self._engine.union.strings[number]
            self._data[row] += string
            for reader in self._readers:
                reader.transcripts[row].append(string)

    def _is_full(self, row: int, active: Tensor) -> bool:
        """Whether a text is too long for a model that is to be run for it."""
        return any(run and reader.is_full(row) for reader, run in zip(self._readers, active[row].tolist(), strict=True))

    def _shares(self, rows: list[int], active: Tensor) -> tuple[Tensor, Tensor]:
        """`UnionEngine.candidates` of some texts, by the models that are run for them."""
        distributions = []
        for i, reader in enumerate(self._readers):
            scores = reader.processed(rows, self._engine.union.writable(i, reader.logits[rows]))
            known = self._engine.union.probabilities(i, scores.to(self._engine.device))
            distributions.append(known * active[rows, i, None].to(known))
        return self._engine.candidates(distributions)

    def _measure(self, active: Tensor) -> None:
        """`SIGNALS` of unfinished texts, where they end now."""
        rows = [row for row, finished in enumerate(self._finished) if not finished]
        if not rows:
            return
        _, shares = self._shares(rows, active)
        run = active[rows].to(shares.device)[:, :, None]  # (A, K, 1)
        size = (shares > 0).any(1).sum(-1, keepdim=True) if self._engine.top_k else None
        measured = distribution_signals(shares, run[..., 0], size).cpu()
        fresh = torch.cat([measured, torch.zeros_like(measured[..., :1])], -1)
        stale = torch.ones(len(SIGNALS), dtype=torch.bool)
        stale[-1] = False
        kept = self._signals[rows].where(stale, 1.0)
        self._signals[rows] = fresh.where(active[rows][:, :, None], kept)


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> list[int]:
    """A prompt as a model reads it alone."""
    if is_chat(tokenizer) and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    elif not is_chat(tokenizer) and not isinstance(prompt, str):
        prompt = "\n".join(turn["content"] for turn in prompt)
    return token_ids(tokenizer, prompt)
