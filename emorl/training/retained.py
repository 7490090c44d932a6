"""What answers at one trade-off on the test prompts: the ensemble, its soup and the adapter distilled from it, scored alike."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from emorl.aggregation.ensemble import AdapterMixture, HiddenStateEnsemble, ParameterAverage
from emorl.evaluation.pareto import hypervolume, reference_point
from emorl.evaluation.retention import DISTILLED, ENSEMBLE, SOUP, SYSTEMS, kept_divergence, kept_value
from emorl.evaluation.scoring import generate, score, summarize
from emorl.objectives.loading import Objective
from emorl.policies.preference_line import PreferenceLine
from emorl.runs.results import Retention, TradeOff
from emorl.training.questions import Questions, divergences, teacher_texts

_RESAMPLES = 2000
NATS, TOKENS = "nats_from_ensemble", "ensemble_tokens"
"""columns of a table: of each prompt, the divergence on the ensemble's answer to it, and the tokens of that answer"""


@dataclass(frozen=True)
class Compared:
    """Three ways to the same trade-offs, on one base; with a `line`, the distilled adapter reads the weights in it."""

    ensemble: HiddenStateEnsemble
    soup: ParameterAverage
    distilled: HiddenStateEnsemble
    tokenizer: PreTrainedTokenizerBase
    line: PreferenceLine | None = None

    def tables(
        self,
        weights: Mapping[str, float],
        data: Dataset,
        objectives: Sequence[Objective],
        generation: Mapping[str, Any],
        *,
        samples: int,
        batch: int,
        seed: int,
    ) -> dict[str, pd.DataFrame]:
        """System -> its scored answers to the prompts of `data`, with its divergence on each."""
        prompts, mixed = list(data["prompt"]), torch.tensor([self.ensemble.in_order(weights)])
        told = prompts if self.line is None else [self.line.put_into(prompt, weights) for prompt in prompts]
        asked = Questions(prompts, mixed.expand(len(prompts), -1), told)
        texts = teacher_texts(self.ensemble, self.tokenizer, asked, generation, batch=batch, seed=seed)
        models: dict[str, tuple[AdapterMixture, bool]] = {
            ENSEMBLE: (self.ensemble, True), SOUP: (self.soup, True), DISTILLED: (self.distilled, False)
        }  # fmt: skip
        tables = {}
        for name, (model, mixes) in models.items():
            answered = generate(
                model, self.tokenizer, prompts if mixes else told, generation, samples=samples, batch=batch, seed=seed,
                per_prompt={"weights": asked.weights} if mixes else None,
            )  # fmt: skip
            away = divergences(model, self.ensemble, texts, mixes)
            table = score(answered, data, objectives)
            rows = torch.tensor(table["prompt_index"].to_numpy())
            tables[name] = table.assign(**{NATS: away[rows, 0].numpy(), TOKENS: away[rows, 1].numpy()})
        return tables


def summarized(trade_off: TradeOff, tables: Mapping[str, pd.DataFrame], importance: Mapping[str, float]) -> TradeOff:
    """The trade-off with what its tables say."""
    names = list(importance)
    found = {system: summarize(tables[system], names) for system in SYSTEMS}
    return TradeOff(
        trade_off.name,
        trade_off.weights,
        trade_off.held_out,
        scores={system: {name: row[name] for name in names} for system, row in found.items()},
        value={system: sum(share * row[name] for name, share in importance.items()) for system, row in found.items()},
        divergence={system: per_token(tables[system]) for system in SYSTEMS},
        words={system: row["words"] for system, row in found.items()},
        distinct_share={system: row["distinct_share"] for system, row in found.items()},
    )


def retentions(tables: Mapping[str, pd.DataFrame], importance: Mapping[str, float], seed: int) -> dict[str, Retention]:
    """What is kept in divergence, in value and in each objective's score, which may differ where their mean does not.

    Args:
        tables: system -> its table.
        importance: of the objectives, in the value.
    """
    names = list(importance)
    of_scores = {"value": list(importance.values())}
    of_scores |= {f"score {name}": [float(name == other) for other in names] for name in names}
    soup, distilled = (by_prompt(tables[name], [NATS, TOKENS]) for name in (SOUP, DISTILLED))
    scores = {name: by_prompt(tables[name], names) for name in SYSTEMS}
    return {
        "divergence": kept_divergence(soup, distilled, _RESAMPLES, seed),
        **{what: kept_value(scores, shares, _RESAMPLES, seed) for what, shares in of_scores.items()},
    }


def hypervolumes(found: Sequence[TradeOff], objectives: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """What each system offers at the front's trade-offs, and the reference point of all of them (direction: maximise)."""
    points = {name: [[one.scores[name][o] for o in objectives] for one in found if not one.held_out] for name in SYSTEMS}
    reference = reference_point([point for of in points.values() for point in of])
    volumes = {name: hypervolume(of, reference) for name, of in points.items()}
    return volumes, dict(zip(objectives, reference, strict=True))


def follows(found: Sequence[TradeOff], objectives: Sequence[str]) -> dict[str, float]:
    """Correlation of the distilled adapter's scores with the ensemble's over the trade-offs, by objective; NaN where one of
    both is the same at all of them."""
    correlations = {}
    for name in objectives:
        meant, given = (np.array([one.scores[system][name] for one in found]) for system in (ENSEMBLE, DISTILLED))
        moves = np.ptp(meant) > 0 and np.ptp(given) > 0
        correlations[name] = float(np.corrcoef(meant, given)[0, 1]) if moves else math.nan
    return correlations


def by_prompt(table: pd.DataFrame, columns: Sequence[str]) -> Any:
    """Means of each prompt (P, C)."""
    return table.groupby("prompt_index")[list(columns)].mean().to_numpy()


def per_token(table: pd.DataFrame) -> float:
    """Nats from the ensemble per token of its answers."""
    nats, tokens = by_prompt(table, [NATS, TOKENS]).sum(0)
    return float(nats / tokens)
