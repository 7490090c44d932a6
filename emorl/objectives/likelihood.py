"""Fluency as the perplexity of a completion under a causal language model (EMORL's fluency objective).

Departures from the authors' code: the perplexity is of the completion given the prompt, not of both together (which
mostly scores the prompt); completions are batched; an empty completion scores 0 instead of the prompt's perplexity.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from emorl.data import completion_text, prompt_text
from emorl.objectives.batching import score_in_batches


class Likelihood:
    """Scores in [0, 1] from ppl = exp(mean negative log-likelihood of the completion's tokens, end token included).

    Args:
        model: folder or hub id of a causal language model with safetensors weights.
        scale: `linear` is max(0, (ceiling - ppl) / ceiling), the paper's form; `inverse` is ppl ** (-1 / temperature),
            the geometric mean token probability, softened.
        ceiling: perplexity that scores 0 under `linear` (paper: 50).
        temperature: softening of `inverse`; 1 is the plain mean probability.
        batch_size: completions per forward pass; they are sorted by length first.
    """

    def __init__(
        self,
        model: str,
        scale: Literal["linear", "inverse"] = "linear",
        ceiling: float = 50.0,
        temperature: float = 1.0,
        batch_size: int = 64,
    ) -> None:
        if scale not in ("linear", "inverse"):
            raise ValueError(f"likelihood: scale is 'linear' or 'inverse', got {scale!r}")
        if ceiling <= 1 or temperature <= 0:
            raise ValueError(f"likelihood: expected ceiling > 1 and temperature > 0, got {ceiling} and {temperature}")
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._model = AutoModelForCausalLM.from_pretrained(model, use_safetensors=True).eval()
        self._model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
        self._model.requires_grad_(False)
        self._scale, self._ceiling, self._temperature, self._batch_size = scale, ceiling, temperature, batch_size

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        texts = [completion_text(completion) for completion in completions]
        pairs = list(zip(map(prompt_text, prompts), texts, strict=True))
        return score_in_batches(pairs, self._scores, self._batch_size)

    def _scores(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        return [
            self._score(nll) if completion.strip() else 0.0
            for nll, (_, completion) in zip(self.negative_log_likelihoods(pairs), pairs, strict=True)
        ]

    def _score(self, nll: float) -> float:
        if self._scale == "linear":
            return max(0.0, 1.0 - math.exp(min(nll, 50.0)) / self._ceiling)
        return math.exp(-nll / self._temperature)

    def negative_log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Mean negative log-likelihood per completion token, in nats, of each (prompt, completion)."""
        return self._mean_nlls([self._encode(prompt, completion) for prompt, completion in pairs])

    def concatenated_negative_log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """As EMORL's authors measure it: per token of prompt and completion as one text, all but its first token.

        Their ids follow each other without chat format, space or end token, cut at the tokenizer's longest input. This
        mostly scores the prompt; it is here to compare with the paper.
        """
        rows = [self._tokenizer(*pair, truncation=True)["input_ids"] for pair in pairs]
        return self._mean_nlls([(row[:1], row[1:]) for row in rows])

    @torch.no_grad()
    def _mean_nlls(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """Mean negative log-likelihood of each row's second ids after its first ones."""
        length = max(len(prompt) + len(completion) for prompt, completion in rows)
        ids = torch.full((len(rows), length), 0)  # (B, T), padded right: causal, so padding changes nothing before it
        scored = torch.zeros((len(rows), length), dtype=torch.bool)
        for row, (prompt, completion) in enumerate(rows):
            ids[row, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
            scored[row, len(prompt) : len(prompt) + len(completion)] = True
        ids, scored = ids.to(self._model.device), scored.to(self._model.device)
        logits = self._model(input_ids=ids).logits[:, :-1].float()  # (B, T-1, V)
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # (B, T-1)
        nll = nll.masked_fill(~scored[:, 1:], 0.0).sum(1)
        return (nll / scored[:, 1:].sum(1).clamp(min=1)).tolist()

    def _encode(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Ids of the prompt and of the completion with its end token, in the language model's own chat format."""
        tokenizer = self._tokenizer
        if tokenizer.chat_template is None:
            before = tokenizer(prompt)["input_ids"]
            after = tokenizer(f" {completion}", add_special_tokens=False)["input_ids"]
        else:
            turns = [{"role": "user", "content": prompt}]
            before = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
            after = tokenizer(completion, add_special_tokens=False)["input_ids"]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return before, after + end
