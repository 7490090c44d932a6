"""Candidates that are weights become scores on the validation prompts: the expensive half of the weight search.

Greedy candidates are decoded as one trie, with all prefixes remembered for the whole search; any other decoding, and that of
parameter averages, runs through `generate()`; sampled candidates one by one, with the same random numbers. Each text is scored
once. With `search.race`, candidates that are clearly worse than the best on the first prompts do not see the others.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from emorl.aggregation.ensemble import AdapterMixture, HiddenStateEnsemble
from emorl.aggregation.trie import TrieDecoder, plain_greedy
from emorl.config import UserError
from emorl.config.experiment import SearchConfig
from emorl.evaluation.memo import ScoreMemo
from emorl.evaluation.scoring import completions_table, generate, mean_and_error, score
from emorl.objectives.loading import Objective
from emorl.objectives.scalarize import Value
from emorl.policies.prompts import encode
from emorl.search.racing import blocks, survivors
from emorl.search.spaces.weight_space import WeightSpace
from emorl.search.study import Finished, Params, Scored

_ROWS = 256  # sequences decoded together by generate()


class WeightEvaluator:
    """Some candidates -> their scores; notes hold the standard errors, the cost, and how many prompts were seen."""

    def __init__(
        self,
        ensemble: AdapterMixture,
        tokenizer: PreTrainedTokenizerBase,
        data: Dataset,
        objectives: Sequence[Objective],
        space: WeightSpace,
        search: SearchConfig,
        *,
        generation: Mapping[str, Any],
        seed: int,
        value: Value,
        memo: ScoreMemo,
    ) -> None:
        """`value` ranks candidates in a race; the other arguments are those of the experiment."""
        self._ensemble, self._tokenizer, self._data, self.objectives = ensemble, tokenizer, data, objectives
        self._space, self._search, self._generation, self._seed = space, search, generation, seed
        self._value, self._memo = value, memo
        self._prompts = list(data["prompt"])
        greedy = plain_greedy(ensemble, generation) if search.samples == 1 else None
        self._is_greedy = greedy is not None
        # Of parameter averages every candidate gives a prefix another state: nothing could be shared.
        self._trie = self._new_trie(greedy) if greedy is not None and isinstance(ensemble, HiddenStateEnsemble) else None
        self._best: np.ndarray | None = None  # (P, O) scores of the best candidate that saw all prompts

    def _new_trie(self, greedy: Mapping[str, Any]) -> TrieDecoder:
        assert isinstance(self._ensemble, HiddenStateEnsemble)
        inputs = encode(self._tokenizer, self._prompts)
        memory = _free_memory() // 2 if self._search.memory is None else int(self._search.memory * 2**30)
        try:
            return TrieDecoder(self._ensemble, inputs["input_ids"], inputs["attention_mask"], **greedy, memory=memory)
        except ValueError as error:
            raise UserError(f"search.memory: {error}") from None

    def describe_work(self) -> str:
        """One line on what this process computed: prefixes, scores of texts."""
        scores = f"{self._memo.scored} of {self._memo.scored + self._memo.known} scores computed here, the others known"
        if self._trie is None:
            return scores
        return f"{self._trie.work.tokens} tokens from {self._trie.work.rows} prefixes; {scores}"

    def remember(self, finished: Sequence[Finished]) -> None:
        """Takes the best candidate of former runs into the races."""
        for trial in finished:
            if "by_prompt" in trial.notes:
                self._challenge(np.array(trial.notes["by_prompt"], dtype=float))

    def __call__(self, candidates: Sequence[Params]) -> list[Scored]:
        vectors = torch.tensor([self._space.vector(candidate) for candidate in candidates])  # (C, K)
        names = [objective.name for objective in self.objectives]
        rounds = [len(self._data)] if self._search.race is None else blocks(len(self._data), self._search.race_prompts)
        scores = np.full((len(candidates), len(self._data), len(names)), np.nan)
        costs = [{"prompts": 0, "completions": 0, "tokens": 0, "reward_calls": 0, "seconds": 0.0} for _ in candidates]
        racing, seen = np.arange(len(candidates)), 0
        for upto in rounds:
            if len(racing) == 0:  # the best of an earlier batch has won
                break
            start, scored_before = time.perf_counter(), self._memo.scored
            table = score(self._complete(vectors[racing], range(seen, upto)), self._data, self.objectives, self._memo)
            calls = self._memo.scored - scored_before
            for index, candidate in enumerate(racing):
                rows = table[table["candidate"] == index]
                scores[candidate, seen:upto] = rows.groupby("prompt_index")[names].mean()
                costs[candidate]["prompts"] += upto - seen
                costs[candidate]["completions"] += len(rows)
                costs[candidate]["tokens"] += int(rows["tokens"].sum())
                costs[candidate]["reward_calls"] += calls // len(racing) + (index < calls % len(racing))
                costs[candidate]["seconds"] += (time.perf_counter() - start) / len(racing)
            seen = upto
            if upto < len(self._data):
                racing = racing[self._still_racing(scores[racing, :upto], len(candidates) * len(rounds))]
        if self._search.race is not None:
            for candidate in racing:
                self._challenge(scores[candidate])
        return [self._scored(one, cost) for one, cost in zip(scores, costs, strict=True)]

    def _still_racing(self, scores: np.ndarray, comparisons: int) -> np.ndarray:
        """Which of the candidates' scores (C, N, O) may still become the best ones: (C,) booleans."""
        assert self._search.race is not None
        known = [] if self._best is None else [self._best[None, : scores.shape[1]]]
        field = np.concatenate([scores, *known])
        return survivors(field, self._value, self._search.race, comparisons)[: len(scores)]

    def _challenge(self, scores: np.ndarray) -> None:
        if self._best is None:
            self._best = scores
            return
        known, new = self._value(np.stack([np.nanmean(self._best, 0), np.nanmean(scores, 0)]))  # chebyshev needs both
        if new > known:
            self._best = scores

    def _scored(self, scores: np.ndarray, cost: Mapping[str, Any]) -> Scored:
        """The trial of scores (P, O), of which `cost["prompts"]` rows are known."""
        names = [objective.name for objective in self.objectives]
        seen = cost["prompts"]
        rows = pd.DataFrame(scores[:seen], columns=names).assign(prompt_index=range(seen))
        means, errors = mean_and_error(rows, names)
        for name, mean in zip(names, means, strict=True):
            if np.isnan(mean):
                raise UserError(f"objective {name!r} returned None for every one of {seen} prompts; a search needs scores")
        notes: dict[str, Any] = {"errors": errors, "cost": dict(cost)}
        if self._search.race is not None and seen == len(self._data):
            notes["by_prompt"] = scores.round(6).tolist()
        return Scored(tuple(means), notes)

    def _complete(self, vectors: torch.Tensor, prompts: range) -> pd.DataFrame:
        """Completions of weights (C, K) for some of the prompts, with a column `candidate`."""
        if self._trie is not None:
            tokens = self._trie.decode(vectors, prompts)  # (C, P, T)
            order = [(index, 0) for index in prompts] * len(vectors)
            table = completions_table(self._tokenizer, self._prompts, order, tokens.flatten(0, 1))
            return table.assign(candidate=np.repeat(np.arange(len(vectors)), len(prompts)))
        if self._is_greedy:
            return self._generate(vectors, prompts)
        alone = [self._generate(vector[None], prompts).assign(candidate=index) for index, vector in enumerate(vectors)]
        return pd.concat(alone, ignore_index=True)  # one by one, so that all see the same random numbers

    def _generate(self, vectors: torch.Tensor, prompts: range) -> pd.DataFrame:
        """As `_complete`, through `generate()`: candidates and prompts are rows."""
        asked = self._prompts[prompts.start : prompts.stop]
        table = generate(
            self._ensemble,
            self._tokenizer,
            asked * len(vectors),
            self._generation,
            samples=self._search.samples,
            batch=_ROWS,
            seed=self._seed + prompts.start,
            per_prompt={"weights": vectors.repeat_interleave(len(asked), 0)},
        )
        row = table["prompt_index"]
        return table.assign(prompt_index=row % len(asked) + prompts.start, candidate=row // len(asked))


def _free_memory() -> int:
    """Bytes that are free where the model runs."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
