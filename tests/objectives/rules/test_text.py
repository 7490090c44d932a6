import pytest

from emorl.objectives.rules.text import Distinct2, Length, Repetition, quoted_share, repeated_share


def score(objective, *texts):
    return objective(prompts=["p"] * len(texts), completions=list(texts))


def test_length_is_one_inside_and_falls_to_zero_outside():
    texts = ["", "a", "a b", "a b c d", "a b c d e f", "a b c d e f g h", "a b c d e f g h i j"]
    assert score(Length(2, 4), *texts) == [0.0, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]


def test_repetition_counts_repeated_trigrams():
    assert score(Repetition(), "a b c d", "a b c a b c", "a a a a a a", "a", "") == [1.0, 0.75, 0.25, 1.0, 1.0]


def test_distinct_2_by_hand():
    assert score(Distinct2(), "a b a b", "a b c", "a", "") == [2 / 3, 1.0, 0.0, 0.0]


def test_conversations_score_as_their_text():
    assert Distinct2()(["p"], [[{"role": "assistant", "content": "a b a b"}]]) == [2 / 3]


@pytest.mark.parametrize("bounds", [(5, 4), (-1, 4), (0, 0)])
def test_impossible_lengths_are_refused(bounds):
    with pytest.raises(ValueError, match="expected 0 <= minimum <= maximum"):
        Length(*bounds)


def test_phrases_said_again_or_taken_over_are_found():
    assert repeated_share("I am I am I am", 3) == pytest.approx(4 / 6)
    assert repeated_share("you are sad you are sad", 3) == pytest.approx(3 / 6)
    assert repeated_share("you are sad today", 3) == 0.0
    assert quoted_share("so you lost my job", "I lost my job", 3) == pytest.approx(3 / 5)
    assert repeated_share("", 3) == repeated_share("a b", 3) == quoted_share("", "a b c", 3) == 0.0
