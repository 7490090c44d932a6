"""Perplexity of completions under a causal language model: a column of the evaluation, not an objective.

The authors of EMORL (arXiv 2505.02579) take it of prompt and completion together, which mostly scores the prompt: that is
`paper_perplexity`, here to compare with them. `perplexity` is of the completion given the prompt, its end token included.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from emorl.config import UserError
from emorl.objectives.models.batching import score_in_batches
from emorl.objectives.models.likelihood import Likelihood

PERPLEXITY = "perplexity"
PAPER_PERPLEXITY = "paper_perplexity"
_HIGHEST = 50.0  # nats per token: exp of it is finite
_Pairs = Sequence[tuple[str, str]]


def check_language_model(name: str | None) -> None:
    """Refuses a folder that is not there, before anything is trained or loaded."""
    if name is not None and name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise UserError(f"evaluate.perplexity_model {name!r} is not a folder")


def load_language_model(name: str) -> Likelihood:
    """The causal language model of a hub id or folder.

    Raises:
        UserError: there is none.
    """
    try:
        return Likelihood(name)
    except (ValueError, OSError) as error:
        raise UserError(f"evaluate.perplexity_model {name!r}: {str(error).splitlines()[0]:.300}") from None


def with_perplexity(table: pd.DataFrame, model: Likelihood, batch: int) -> pd.DataFrame:
    """The completions with the columns `perplexity` (NaN for an empty completion) and `paper_perplexity`."""
    pairs = list(zip(table["prompt"], table["completion"], strict=True))
    own = _perplexities(pairs, model.negative_log_likelihoods, batch)
    own = [value if completion.strip() else math.nan for value, (_, completion) in zip(own, pairs, strict=True)]
    return table.assign(
        **{PERPLEXITY: own, PAPER_PERPLEXITY: _perplexities(pairs, model.concatenated_negative_log_likelihoods, batch)}
    )


def mean_perplexities(table: pd.DataFrame) -> dict[str, float]:
    """`perplexity` as exp of the mean log over completions, which one odd text does not decide; `paper_perplexity` as plain
    mean, the paper's. Empty where the table has no perplexities."""
    if PERPLEXITY not in table:
        return {}
    return {
        PERPLEXITY: float(np.exp(np.log(table[PERPLEXITY]).mean())),
        PAPER_PERPLEXITY: float(table[PAPER_PERPLEXITY].mean()),
    }


def _perplexities(pairs: _Pairs, mean_nlls: Callable[[_Pairs], list[float]], batch: int) -> list[float]:
    nlls = score_in_batches(pairs, mean_nlls, batch)
    return [math.exp(min(nll, _HIGHEST)) for nll in nlls]
