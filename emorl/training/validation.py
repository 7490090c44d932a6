"""Emorl's own evaluation as any trainer's validation, so that curves, search and report measure the same.

Every process of a distributed run validates all validation prompts: they are few, and so all processes take the same decision.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from datasets import Dataset
from trl.models import unwrap_model_for_generation

from emorl.config import UserError
from emorl.evaluation.scoring import evaluate, summarize, summarize_texts
from emorl.objectives.loading import Objective
from emorl.training.anchor import kl_to_base
from emorl.training.dynaopt import SCORE

PAIR_ACCURACY = "pair_accuracy"
_VALIDATED = ("distinct_share", "distinct_2", "words", "repeated_trigrams")  # beside the rewards


@dataclass(frozen=True)
class Validation:
    """What a policy is validated by: decoding as it will be used, scored by its objectives; there are none where its pairs
    alone say what is better."""

    objectives: Sequence[Objective]
    reward_weights: Sequence[float]  # (O,), for the validation reward; an adaptive plan's do not move
    generation: Mapping[str, Any]
    data: Dataset


class ValidatedPolicy:
    """Replaces a trainer's evaluation."""

    def __init__(self, *, validation: Validation, fingerprint: str, **options: Any) -> None:
        super().__init__(**options)
        self.validation = validation
        self.base_fingerprint = fingerprint

    def evaluate(  # called by Trainer
        self: Any, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Decodes the validation prompts; metrics `eval_reward` (weighted mean of the scores, also where training maximises
        their logs; the accuracy on held-out pairs where nothing scores), `eval_score_<objective>`, `eval_kl`, what
        `pair_figures` measures, and `eval_` before what `_VALIDATED` names."""
        start, training = time.perf_counter(), self.model.training
        self.model.eval()
        what, tokenizer = self.validation, self.processing_class
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            table = evaluate(model, tokenizer, what.data, what.objectives, what.generation, seed=self.args.seed).table
            prompts = [what.data["prompt"][index] for index in table["prompt_index"]]
            kl = kl_to_base(model, tokenizer, prompts, table.get("generated", table["completion"]).tolist(), self.ref_model)
        found = {**_summary(table, what), **self.pair_figures()}
        found.setdefault("reward", found.get(PAIR_ACCURACY))
        found |= {"completions": len(table), "tokens": int(table["tokens"].sum()), "runtime": time.perf_counter() - start}
        if kl is not None:
            found["kl"] = kl
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.model.train(training)
        return metrics

    def pair_figures(self) -> dict[str, float]:
        """What is measured on held-out pairs, where a trainer has any."""
        return {}


def _summary(table: pd.DataFrame, what: Validation) -> dict[str, float]:
    names = [objective.name for objective in what.objectives]
    summary = summarize(table, names) if names else summarize_texts(table)
    for name in names:
        if math.isnan(summary[name]):
            raise UserError(f"objective {name!r} returned None for every one of {len(table)} answers; training needs scores")
    found = {key: summary[key] for key in _VALIDATED} | {f"{SCORE}{name}": summary[name] for name in names}
    if names:
        found["reward"] = sum(weight * summary[name] for weight, name in zip(what.reward_weights, names, strict=True))
    return {**found, "reward_calls": len(table) * len(names)}
