"""Length-sorted batches for objectives that run a model."""

from collections.abc import Callable, Iterable, Iterator, Sequence

SPREAD = 1.3  # longest / shortest in a batch: of 256 dialogue turns by 64, a fifth of the tokens is padding instead of 44 %
FIXED = 40  # characters: about what special tokens and a chat template add to every pair

Pair = tuple[str, str]


def score_in_batches(pairs: Sequence[Pair], score: Callable[[Sequence[Pair]], list[float]], batch_size: int) -> list[float]:
    """Scores (prompt, completion) pairs, each distinct pair once, in batches of similar length; in the given order."""
    scores: dict[Pair, float] = {}
    for batch in similar_lengths(set(pairs), batch_size):
        scores.update(zip(batch, score(batch), strict=True))
    return [scores[pair] for pair in pairs]


def similar_lengths(pairs: Iterable[Pair], batch_size: int) -> Iterator[list[Pair]]:
    """Batches of at most `batch_size` pairs, shortest first; a new one also where lengths would differ by `SPREAD`."""
    batch: list[Pair] = []
    for pair in sorted(pairs, key=lambda pair: (_size(pair), pair)):
        if batch and (len(batch) == batch_size or _size(pair) > SPREAD * _size(batch[0])):
            yield batch
            batch = []
        batch.append(pair)
    if batch:
        yield batch


def _size(pair: Pair) -> int:
    return FIXED + len(pair[0]) + len(pair[1])
