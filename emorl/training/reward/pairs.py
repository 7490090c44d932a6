"""Pairs that people made, in TRL's preference formats: texts or conversations, the prompt beside the answers or in them."""

import logging
from dataclasses import dataclass

from datasets import Dataset

from emorl.config import UserError
from emorl.config.reward import RewardDataConfig
from emorl.policies.conversation import completion_text, prompt_text
from emorl.training.pair_rows import PairRow, pair_in

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    prompt: str | None
    chosen: str
    rejected: str
    asked: str
    """the same for all pairs of one prompt, also where the answers are read alone"""
    where: str


def read_pairs(data: RewardDataConfig, table: Dataset, path: str) -> list[Pair]:
    """The pairs of a table whose columns are there; those of two equal texts are left out, for they order nothing.

    Raises:
        UserError: an answer that is none, no prompt, two equal texts in every row.
    """
    pairs = []
    for number, row in enumerate(table, start=1):
        assert isinstance(row, dict)
        where = f"{path}, row {number}"
        assert data.chosen_column is not None
        assert data.rejected_column is not None
        pair = pair_in(row, where, data.chosen_column, data.rejected_column, data.prompt_column)
        if completion_text(pair.chosen).strip() != completion_text(pair.rejected).strip():
            pairs.append(_pair(data, pair, where))
    if not pairs:
        raise UserError(f"{path}: {data.chosen_column!r} and {data.rejected_column!r} are equal in all rows; nothing to learn")
    if len(pairs) < len(table):
        logger.warning("%s: %d of %d pairs have two equal texts and were left out", path, len(table) - len(pairs), len(table))
    return pairs


def _pair(data: RewardDataConfig, pair: PairRow, where: str) -> Pair:
    asked = where if pair.prompt is None else prompt_text(pair.prompt)
    said = None if data.prompt_column is None else asked
    if pair.is_implicit and isinstance(pair.prompt, str):
        asked = pair.prompt.rpartition("\n")[0] or pair.prompt  # the last line may hold what two answers begin with
    return Pair(said, completion_text(pair.chosen), completion_text(pair.rejected), asked, where)
