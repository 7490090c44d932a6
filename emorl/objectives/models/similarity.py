"""Specificity: how much better a completion fits its own prompt than other people's prompts."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel

from emorl.objectives.models.frozen_model import load_frozen
from emorl.policies.conversation import completion_text, prompt_text
from emorl.policies.loading import read_tokenizer

_REMEMBERED = 50_000


class SentenceEncoder:
    """Normalised mean-pooled states of a sentence encoder, (N, H); embeddings are remembered while there is room.

    Args:
        model: folder or hub id of an encoder with safetensors weights, e.g. sentence-transformers/all-MiniLM-L6-v2.
        max_tokens: texts are cut there.
        batch_size: texts per forward pass; they are sorted by length first.
    """

    def __init__(self, model: str, max_tokens: int = 128, batch_size: int = 64) -> None:
        self._model = load_frozen(AutoModel, model, "auto")
        self._tokenizer = read_tokenizer(model, "model")
        self._max_tokens, self._batch_size = max_tokens, batch_size
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        new = sorted(set(texts) - self._known.keys(), key=lambda text: (len(text), text))
        for start in range(0, len(new), self._batch_size):
            batch = new[start : start + self._batch_size]
            inputs = self._tokenizer(
                batch, padding=True, padding_side="right", truncation=True, max_length=self._max_tokens, return_tensors="pt"
            ).to(self._model.device)
            mask = inputs["attention_mask"][..., None]  # (B, T, 1)
            pooled = (self._model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
            self._known.update(zip(batch, functional.normalize(pooled.float(), dim=-1).cpu(), strict=True))
        return torch.stack([self._known[text] for text in texts])


@functools.lru_cache(maxsize=4)
def shared_encoder(model: str) -> SentenceEncoder:
    """One encoder of `model` for all objectives of a process: each text is embedded once, whoever asks."""
    return SentenceEncoder(model)


class Specificity:
    """Scores in [0, 1]: sigmoid(slope * (evidence - offset)), the evidence that a completion answers its own prompt rather
    than those of a bank, in nats, by a sentence encoder.

        evidence = similarity(own prompt) / temperature - log mean over the bank of exp(similarity(bank prompt) / temperature)

    Of cosine similarities this is the pointwise mutual information of prompt and completion under a softmax
    over prompts (InfoNCE, van den Oord et al. 2018). One sentence for every prompt cannot score well on average: over
    prompts drawn as the bank was, the mean of exp(evidence) is 1, whatever the sentence. Nothing in it asks for good
    text: a copy of the prompt scores 1; combine it with what refuses that.

    Args:
        model: folder or hub id of a sentence encoder.
        bank: a text file with one prompt per line, or the prompts; 50 or more, drawn as those that will be asked.
        temperature: of the softmax.
        slope: steepness, per nat.
        offset: evidence, in nats, that scores 0.5.

    >>> Specificity("sentence-transformers/all-MiniLM-L6-v2", bank="prompts.txt")(  # doctest: +SKIP
    ...     prompts=["I cannot sleep."], completions=["Lying awake wears you out."])
    [0.93]
    """

    range: ClassVar = (0.0, 1.0)

    def __init__(
        self,
        model: str,
        bank: str | Sequence[str],
        temperature: float = 0.05,
        slope: float = 1.0,
        offset: float = 1.0,
    ) -> None:
        if temperature <= 0 or slope <= 0:
            raise ValueError(f"specificity: expected temperature > 0 and slope > 0, got {temperature} and {slope}")
        prompts = _read_bank(bank) if isinstance(bank, str) else [prompt for prompt in bank if prompt.strip()]
        if len(prompts) < 2:
            raise ValueError(f"specificity: the bank needs at least 2 prompts (better 50), got {len(prompts)}")
        self._encode = shared_encoder(model)
        self._bank = self._encode(prompts)  # (N, H)
        self._temperature, self._slope, self._offset = temperature, slope, offset

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        texts = [completion_text(completion) for completion in completions]
        evidence = self.evidence([prompt_text(prompt) for prompt in prompts], texts)
        scores = torch.sigmoid(self._slope * (evidence - self._offset)).tolist()
        return [score if text.strip() else 0.0 for score, text in zip(scores, texts, strict=True)]

    def evidence(self, prompts: Sequence[str], completions: Sequence[str], temperature: float | None = None) -> Tensor:
        """Nats for each (prompt, completion), (N,), at another temperature if one is given."""
        if len(completions) == 0:
            return torch.zeros(0)
        temperature = temperature or self._temperature
        states, prompt_states = self._encode(completions), self._encode(prompts)  # (N, H)
        own_prompt = (states * prompt_states).sum(1) / temperature  # (N,)
        others = torch.logsumexp(states @ self._bank.T / temperature, dim=1)  # (N,)
        return own_prompt - others + math.log(len(self._bank))


def _read_bank(bank: str) -> list[str]:
    path = Path(bank)
    if not path.is_file():
        raise ValueError(f"specificity: no file {bank!r}; `bank` is a text file with one prompt per line")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
