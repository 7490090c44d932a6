"""Fluency as the perplexity of a completion under a causal language model (EMORL's fluency objective).

Departures from the authors' code, all but `scale: paper`: the perplexity is of the completion given the prompt, not of
both together (which mostly scores the prompt); the end token counts, so a text that breaks off is improbable; what a
language model finds easy without its being fluent (repetition, a copied prompt, a word or two) is corrected for.
"""

import logging
import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from transformers import AutoModelForCausalLM

from emorl.objectives.models.batching import score_in_batches
from emorl.objectives.models.frozen_model import batch_tolerance, load_frozen, longest_input
from emorl.objectives.rules.text import quoted_share, repeated_share
from emorl.policies.conversation import completion_text, prompt_text
from emorl.policies.loading import read_tokenizer

logger = logging.getLogger(__name__)

PHRASE = 3  # words that count as repeated or quoted when they occur together again
FREE_REPEATED, FREE_QUOTED = 0.25, 0.75  # none of 1,700 human responses repeats more; 2 of PAIR's 768 reflections quote more


class Likelihood:
    """Scores in [0, 1], falling with the mean negative log-likelihood (NLL) of the completion's tokens, end included:

        score = evidence * scale(exp(NLL + ln V * (over(repeated, 1/4) + over(quoted, 3/4))))
        over(share, free) = max(0, share - free) / (1 - free)
        evidence = min(1, distinct words / minimum_words); 0 where there is no letter or digit

    V is the vocabulary's size, so a text that only repeats itself or the prompt costs at least as much as guessing each
    token blindly; repeated and quoted are shares of words in 3-word phrases. Where text is neither
    short nor copied, score = scale(perplexity).

    What is longer than the model has positions for loses the prompt's beginning, down to a quarter of the positions, then the
    completion's end; the first time is logged.

    Args:
        model: folder or hub id of a causal language model with safetensors weights.
        scale: `inverse` is ppl ** (-1 / temperature), the geometric mean token probability, softened; `linear` is
            max(0, (ceiling - ppl) / ceiling), which ties at 0 all text above the ceiling; `paper` is `linear` of the plain
            text of prompt and completion together and without any correction, as the authors' code has it.
        ceiling: perplexity that scores 0 under `linear` and `paper` (paper: 50).
        temperature: softening of `inverse`; 1 is the plain mean probability.
        floor: perplexity that is fluent enough to score 1, say that of human responses; None rewards every further bit of
            predictability, which ends at one stock sentence.
        minimum_words: distinct words that are full evidence; 0 for languages written without spaces.
        batch_size: completions per forward pass; they are sorted by length first.
        dtype: `auto` computes as the weights were saved; `bfloat16` is faster in batches where the processor multiplies in
            it (benchmarks/README.md) and moves scores by a few thousandths; `float32`.
    """

    range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __init__(
        self,
        model: str,
        scale: Literal["inverse", "linear", "paper"] = "inverse",
        ceiling: float = 50.0,
        temperature: float = 1.0,
        floor: float | None = None,
        minimum_words: int = 5,
        batch_size: int = 64,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    ) -> None:
        if scale not in ("inverse", "linear", "paper"):
            raise ValueError(f"likelihood: scale is 'inverse', 'linear' or 'paper', got {scale!r}")
        if ceiling <= 1 or temperature <= 0:
            raise ValueError(f"likelihood: expected ceiling > 1 and temperature > 0, got {ceiling} and {temperature}")
        if floor is not None and (scale == "paper" or not 1 <= floor < (ceiling if scale == "linear" else math.inf)):
            raise ValueError(f"likelihood: expected 1 <= floor, below the ceiling, and not with 'paper'; got {floor}")
        if minimum_words < 0:
            raise ValueError(f"likelihood: expected minimum_words of at least 0, got {minimum_words}")
        self._model = load_frozen(AutoModelForCausalLM, model, dtype)
        self._tokenizer = read_tokenizer(model, "model")
        self.batch_tolerance = batch_tolerance(self._model)
        self._longest, self._has_cut = longest_input(self._model), False
        self._scale, self._ceiling, self._temperature, self._batch_size = scale, ceiling, temperature, batch_size
        self._floor, self._minimum_words = floor, minimum_words

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        texts = [completion_text(completion) for completion in completions]
        pairs = list(zip(map(prompt_text, prompts), texts, strict=True))
        return score_in_batches(pairs, self._scores, self._batch_size)

    def _scores(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        paper = self._scale == "paper"
        nlls = self.concatenated_negative_log_likelihoods(pairs) if paper else self.negative_log_likelihoods(pairs)
        return [self._score(nll, *pair) for nll, pair in zip(nlls, pairs, strict=True)]

    def _score(self, nll: float, prompt: str, completion: str) -> float:
        if self._scale == "paper":
            return self._scaled(nll)
        words, asked = _words(completion), _words(prompt)
        distinct = len(set(words.split()))
        if distinct == 0:
            return 0.0
        repeated = _over(repeated_share(words, PHRASE), FREE_REPEATED)
        quoted = _over(quoted_share(words, asked, PHRASE), FREE_QUOTED)
        nll += (repeated + quoted) * math.log(self._model.config.get_text_config().vocab_size)
        if self._floor is not None:
            fluent = math.log(self._floor)
            score = self._scaled(max(nll, fluent)) / self._scaled(fluent)
        else:
            score = self._scaled(nll)
        return score * min(1.0, distinct / max(1, self._minimum_words))

    def _scaled(self, nll: float) -> float:
        if self._scale == "inverse":
            return math.exp(-nll / self._temperature)
        return max(0.0, 1.0 - math.exp(min(nll, 50.0)) / self._ceiling)

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
        rows = [self._cut(*row) for row in rows]
        length = max(len(prompt) + len(completion) for prompt, completion in rows)
        ids = torch.full((len(rows), length), 0)  # (B, T), padded right: causal, so padding changes nothing before it
        scored = torch.zeros((len(rows), length), dtype=torch.bool)
        for row, (prompt, completion) in enumerate(rows):
            ids[row, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
            scored[row, len(prompt) : len(prompt) + len(completion)] = True
        ids, scored = ids.to(self._model.device), scored.to(self._model.device)
        wanted = scored[:, 1:]
        logits = self._model(input_ids=ids).logits[:, :-1][wanted].float()  # (scored tokens, V)
        nll = torch.nn.functional.cross_entropy(logits, ids[:, 1:][wanted], reduction="none")
        return [row.sum().item() / max(1, len(row)) for row in nll.split(wanted.sum(1).tolist())]

    def _cut(self, prompt: list[int], completion: list[int]) -> tuple[list[int], list[int]]:
        """As much of them as the model has positions for."""
        if self._longest is None or len(prompt) + len(completion) <= self._longest:
            return prompt, completion
        if not self._has_cut:
            self._has_cut = True
            logger.warning("likelihood: a text longer than the model's %d positions was cut (said once)", self._longest)
        room = max(self._longest - len(completion), self._longest // 4)
        prompt = prompt[-room:]
        return prompt, completion[: self._longest - len(prompt)]

    def _encode(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Ids to condition on (the prompt) and to score (completion and end token), in the model's own chat format."""
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


def _words(text: str) -> str:
    """Words in lower case and without punctuation."""
    return " ".join(filter(None, (re.sub(r"\W", "", word) for word in text.lower().split())))


def _over(share: float, free: float) -> float:
    return max(0.0, share - free) / (1.0 - free)
