"""Which pairs share a forward pass, and that the caller cannot tell."""

from emorl.objectives.models.batching import FIXED, SPREAD, score_in_batches, similar_lengths


def test_batches_are_small_enough_and_of_similar_length():
    pairs = [("p" * size, "") for size in range(400)]
    batches = list(similar_lengths(pairs, 16))
    assert [pair for batch in batches for pair in batch] == pairs
    assert max(map(len, batches)) == 16
    assert all(FIXED + len(batch[-1][0]) <= SPREAD * (FIXED + len(batch[0][0])) for batch in batches)
    assert [len(batch) for batch in similar_lengths([("a", ""), ("b", ""), ("p" * 90, "")], 16)] == [2, 1]
    assert list(similar_lengths([], 16)) == []


def test_each_distinct_pair_is_scored_once_and_the_order_kept():
    seen = []

    def score(batch):
        seen.extend(batch)
        return [float(len(prompt) + len(text)) for prompt, text in batch]

    assert score_in_batches([("aaa", "b"), ("a", ""), ("aaa", "b")], score, 2) == [4.0, 1.0, 4.0]
    assert seen == [("a", ""), ("aaa", "b")]
