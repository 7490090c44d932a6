from emorl.evaluation.text_metrics import distinct_2, distinct_share, mean_words


def test_a_collapsed_policy_has_one_answer():
    assert distinct_share(["You feel it."] * 4) == 0.25
    assert distinct_share(["you  feel IT.", "You feel it."]) == 0.5
    assert distinct_share(["a", "b", "c"]) == 1.0


def test_distinct_2_counts_over_all_completions_together():
    assert distinct_2(["a b c", "a b d"]) == 3 / 4
    assert distinct_2(["a", ""]) == 0.0


def test_words_by_hand():
    assert mean_words(["a b", "", "c d e f"]) == 2.0
