"""Length-sorted batches for objectives that run a model, and the longest input it can read."""

from collections.abc import Callable, Iterator, Sequence

from torch import nn
from transformers import PreTrainedModel

_CHARACTERS = 64 * 1024  # of a batch with its padding: some long texts are not padded sixty-four times


def score_in_batches(
    pairs: Sequence[tuple[str, str]],
    score: Callable[[Sequence[tuple[str, str]]], list[float]],
    batch_size: int,
) -> list[float]:
    """Scores (prompt, completion) pairs, each distinct pair once, in batches of similar length; in the given order."""
    distinct = sorted(set(pairs), key=lambda pair: (_characters(pair), pair))
    scores: dict[tuple[str, str], float] = {}
    for batch in _batches(distinct, batch_size):
        scores.update(zip(batch, score(batch), strict=True))
    return [scores[pair] for pair in pairs]


def _batches(pairs: Sequence[tuple[str, str]], batch_size: int) -> Iterator[list[tuple[str, str]]]:
    """Runs of pairs, which come in order of length, of at most `batch_size` and (but for a single one) `_CHARACTERS`."""
    batch: list[tuple[str, str]] = []
    for pair in pairs:
        if len(batch) == batch_size or (batch and (len(batch) + 1) * _characters(pair) > _CHARACTERS):
            yield batch
            batch = []
        batch.append(pair)
    if batch:
        yield batch


def _characters(pair: tuple[str, str]) -> int:
    return len(pair[0]) + len(pair[1])


def longest_input(model: PreTrainedModel) -> int | None:
    """Tokens of the longest input that a model has positions for; None where positions are not counted."""
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1  # RoBERTa's kind counts from behind the padding index
    return positions
