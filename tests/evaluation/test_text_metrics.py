import pytest

from emorl.evaluation.text_metrics import (
    distinct_2,
    distinct_share,
    diversity_2,
    edit_rate,
    mean_words,
    repeated_trigrams,
    word_tokens,
    words_deviation,
)


def test_a_collapsed_policy_has_one_answer():
    assert distinct_share(["You feel it."] * 4) == 0.25
    assert distinct_share(["you  feel IT.", "You feel it."]) == 0.5
    assert distinct_share(["a", "b", "c"]) == 1.0


def test_distinct_2_counts_over_all_completions_together():
    assert distinct_2(["a b c", "a b d"]) == 3 / 4
    assert distinct_2(["a", ""]) == 0.0


def test_diversity_2_is_distinct_bigrams_per_word_of_each_completion():
    assert diversity_2(["a b c d"]) == 3 / 4
    assert diversity_2(["a b a b"]) == 2 / 4  # ab, ba, ab
    assert diversity_2(["A b a b"]) == 3 / 4  # case counts
    assert diversity_2(["a b c d", "a b a b"]) == pytest.approx(5 / 8)
    assert diversity_2(["word", ""]) == 0.0


def test_one_answer_for_everyone_lowers_distinct_2_but_not_diversity_2():
    assert diversity_2(["a b c"] * 9) == diversity_2(["a b c"])
    assert distinct_2(["a b c"] * 9) == 1 / 9


def test_edit_rate_by_hand():
    assert edit_rate(["I am tired"], ["I am tired"]) == 0.0
    assert edit_rate(["I am tired"], ["You were asleep"]) == 1.0
    assert edit_rate(["I am tired."], ["I am so tired."]) == pytest.approx(1 / 5)  # one insertion, five tokens
    assert edit_rate(["I am tired."], [""]) == 1.0
    assert edit_rate([""], [""]) == 0.0
    assert edit_rate(["a b", "a b"], ["a b", "c d"]) == 0.5


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("I can't sleep, you know.", "I|ca|n't|sleep|,|you|know|."),
        ("You’re worried; it's 10:30 (or 1,000)!", "You|'re|worried|;|it|'s|10:30|(|or|1,000|)|!"),
        ("I'm gonna... well-known -- cannot.", "I|'m|gon|na|...|well-known|--|can|not|."),
        ("First. Second?", "First|.|Second|?"),
        ("the U.S. won't", "the|U.S|.|wo|n't"),
        ("", ""),
    ],
)
def test_word_tokens_follow_the_treebank(text, tokens):
    assert word_tokens(text) == tokens.split("|" if tokens else None)


def test_tokens_hold_every_character_that_is_no_space():
    text = "“Don't!” she said—twice... (at 5:30), to her/his co-worker's dog's dogs' $5 & 7% #1 @me [x] {y} <z>"
    assert "".join(word_tokens(text)) == text.replace(" ", "")


def test_words_by_hand():
    assert mean_words(["a b", "", "c d e f"]) == 2.0
    assert words_deviation(["a b", "", "c d e f"]) == pytest.approx((8 / 3) ** 0.5)
    assert words_deviation(["a b"]) == 0.0


def test_repeated_trigrams_by_hand():
    assert repeated_trigrams(["a b c d"]) == 0.0
    assert repeated_trigrams(["a b a b a b"]) == 0.5  # aba bab aba bab
    assert repeated_trigrams(["a b a b a b", "a b", ""]) == pytest.approx(1 / 6)
