"""Length-sorted batches for objectives that run a model."""

from collections.abc import Callable, Sequence


def score_in_batches(
    pairs: Sequence[tuple[str, str]],
    score: Callable[[Sequence[tuple[str, str]]], list[float]],
    batch_size: int,
) -> list[float]:
    """Scores (prompt, completion) pairs, each distinct pair once, in batches of similar length; in the given order."""
    distinct = sorted(set(pairs), key=lambda pair: (len(pair[0]) + len(pair[1]), pair))
    scores: dict[tuple[str, str], float] = {}
    for start in range(0, len(distinct), batch_size):
        batch = distinct[start : start + batch_size]
        scores.update(zip(batch, score(batch), strict=True))
    return [scores[pair] for pair in pairs]
