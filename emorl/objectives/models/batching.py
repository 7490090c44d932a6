"""Length-sorted batches for objectives that run a model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

SPREAD = 1.3  # longest / shortest in a batch: of 256 dialogue turns by 64, a fifth of the tokens is padding instead of 44 %
FIXED = 40  # characters: about what special tokens and a chat template add to every pair
_CHARACTERS = 64 * 1024  # of a batch with its padding: few long texts at once

Pair = tuple[str, str]
S = TypeVar("S")


def score_in_batches(pairs: Sequence[Pair], score: Callable[[Sequence[Pair]], list[S]], batch_size: int) -> list[S]:
    """Scores (prompt, completion) pairs, each distinct pair once, in batches of similar length; in the given order."""
    scores: dict[Pair, S] = {}
    for batch in similar_lengths(set(pairs), batch_size):
        scores.update(zip(batch, score(batch), strict=True))
    return [scores[pair] for pair in pairs]


def similar_lengths(pairs: Iterable[Pair], batch_size: int) -> Iterator[list[Pair]]:
    """Batches of at most `batch_size` pairs, shortest first; a new one also where lengths would differ by `SPREAD`, or the
    batch would be very large."""
    batch: list[Pair] = []
    for pair in sorted(pairs, key=lambda pair: (_size(pair), pair)):
        size = _size(pair)
        if batch and (len(batch) == batch_size or size > SPREAD * _size(batch[0]) or (len(batch) + 1) * size > _CHARACTERS):
            yield batch
            batch = []
        batch.append(pair)
    if batch:
        yield batch


def _size(pair: Pair) -> int:
    return FIXED + len(pair[0]) + len(pair[1])
