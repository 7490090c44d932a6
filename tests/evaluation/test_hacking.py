import random

import numpy as np
import pandas as pd
import pytest

from emorl.evaluation.hacking import (
    References,
    attack_objective,
    attack_texts,
    best_fixed_response,
    length_correlation,
    rank_correlation,
    rewarded_words,
    sameness,
    verdict,
)

TOPICS = ["mother", "exam", "boss", "vaccine", "mortgage", "sister", "knee", "divorce", "garden", "cousin", "sleep", "wine"]
PROMPTS = [f"I keep thinking about my {topic} and it hurts." for topic in TOPICS]
ANSWERS = {
    "base": "Your {} has been on your mind, painfully so.",
    "sorry": "I'm sorry about that and I'm sorry you hurt.",
    "policy": "Thinking of your {} brings you pain again and again.",
}


def counts_sorry(row, text):
    return float(text.lower().count("sorry"))


def reads_the_prompt(row, text):
    """The prompt's topic is named once, in an answer that begins a sentence with "you", and is no copy."""
    words = text.lower().rstrip(".").split()
    return float(words.count(TOPICS[row]) == 1 and "your " + TOPICS[row] in text.lower() and "my" not in words)


def scorer(rule):
    return lambda rows, texts: [rule(row, text) for row, text in zip(rows, texts, strict=True)]


def completions(rule, systems=("base", "policy")):
    rows = [
        {
            "prompt_index": row,
            "sample": 0,
            "prompt": PROMPTS[row],
            "system": system,
            "completion": ANSWERS[system].format(topic),
        }
        for system in systems
        for row, topic in enumerate(TOPICS)
    ]
    table = pd.DataFrame(rows)
    return table.assign(x=scorer(rule)(table["prompt_index"], table["completion"]))


def check(rule, systems=("base", "policy"), references=References()):  # noqa: B008
    return attack_objective("x", scorer(rule), completions(rule, systems), references, "base", seed=0)


def verdicts(found):
    return {attack.name: attack.verdict for attack in found.attacks}


def test_an_objective_that_counts_a_word_is_hacked_by_one_answer_for_everyone():
    found = check(counts_sorry, ("base", "sorry"))
    fixed = next(attack for attack in found.attacks if attack.name == "best fixed response")
    assert (fixed.verdict, fixed.mean, fixed.error) == ("hacked", 2.0, 0.0)
    assert fixed.example == ANSWERS["sorry"]
    assert verdicts(found)["rewarded words"] == "hacked"
    assert found.bar == 0.0


def test_a_sound_objective_is_hacked_by_nothing():
    found = check(reads_the_prompt)
    assert found.bar == 1.0
    assert set(verdicts(found).values()) == {"refused"}
    assert len(found.attacks) == 7


def test_what_was_spent_is_counted_and_small():
    calls = []

    def score(rows, texts):
        calls.append(len(texts))
        return [0.5] * len(texts)

    table = pd.concat([completions(counts_sorry).assign(prompt_index=lambda t, n=n: t["prompt_index"] + 12 * n,
                                                        completion=lambda t, n=n: t["completion"] + f" {n}")
                       for n in range(30)])  # fmt: skip
    found = attack_objective("x", score, table, References(), "base", seed=0)
    assert found.scored == sum(calls) <= 2100
    assert found.prompts == 64


def test_the_same_seed_gives_the_same_check():
    assert repr(check(reads_the_prompt)) == repr(check(reads_the_prompt))  # NaN is not equal to itself


def test_references_set_the_bar_and_are_tried_as_the_fixed_response():
    lazy = {row: ["I'm sorry, sorry."] for row in range(12)}
    found = check(counts_sorry, references=References(lazy, ["sorry sorry sorry"]))
    assert (found.honest.reference_median, found.bar) == (2.0, 2.0)
    fixed = found.attacks[-1]
    assert (fixed.example, fixed.mean, fixed.verdict) == ("sorry sorry sorry", 3.0, "hacked")
    assert verdicts(found)["empty"] == "refused"


def test_an_objective_that_scores_nothing_is_unscored_without_a_warning():
    table = completions(counts_sorry).assign(x=np.nan)
    found = attack_objective("x", lambda rows, texts: [None] * len(texts), table, References(), "base", seed=0)
    assert set(verdicts(found).values()) == {"unscored"}
    assert np.isnan(found.length_of_base.value)


def test_an_objective_that_cannot_score_the_empty_text_is_checked_on_the_rest():
    found = check(lambda row, text: reads_the_prompt(row, text) if text else None)
    assert verdicts(found) == {**verdicts(check(reads_the_prompt)), "empty": "unscored"}


def test_constant_scores_give_no_correlation_and_no_warning():
    found = check(lambda row, text: 0.5)
    assert np.isnan(found.length_of_all.value)
    assert np.isnan(found.length_of_all.low)
    assert set(verdicts(found).values()) == {"hacked"}  # it pays as much for nothing as for an answer


def test_attack_texts_are_what_their_names_say():
    table = completions(reads_the_prompt)
    texts = attack_texts("x", table, random.Random(0))
    good = [ANSWERS["base"].format(topic) for topic in TOPICS]
    assert texts["empty"] == [""] * 12
    assert texts["prompt repeated"] == PROMPTS
    assert texts["another prompt's output"] == good[1:] + good[:1]
    for text, source, phrase in zip(texts["words shuffled"], good, texts["phrase repeated"], strict=True):
        assert text != source
        assert sorted(text.split()) == sorted(source.split())
        assert " ".join(phrase.split()[:3]) in source
        assert phrase.split() == phrase.split()[:3] * 5


def test_rewarded_words_are_those_of_the_best_texts():
    texts = [f"gold {n} a b" for n in range(5)] + [f"lead {n} a b" for n in range(15)]
    assert rewarded_words(texts, [1.0] * 5 + [0.0] * 15)[0] == "gold"
    assert "lead" not in rewarded_words(texts, [1.0] * 5 + [0.0] * 15)


def test_verdicts():
    assert verdict(0.5, 0.1, 0.5) == "hacked"
    assert verdict(0.4, 0.06, 0.5) == "close"
    assert verdict(0.4, 0.04, 0.5) == "refused"
    assert verdict(0.4, float("nan"), 0.5) == "refused"
    assert verdict(float("nan"), 0.1, 0.5) == "unscored"


def test_the_best_fixed_response_equals_trying_all_on_all():
    rng = np.random.default_rng(0)
    worth = {f"text {n}": rng.random() for n in range(40)}
    scores = {(prompt, text): value + 0.01 * rng.normal() for text, value in worth.items() for prompt in range(30)}

    def score(prompts, texts):
        return [scores[pair] for pair in zip(prompts, texts, strict=True)]

    found = best_fixed_response(score, range(30), [*worth] * 2, seed=0, finalists=10)
    means = {text: np.mean([scores[prompt, text] for prompt in range(30)]) for text in worth}
    assert found.text == max(means, key=lambda text: means[text])
    assert found.mean == pytest.approx(max(means.values()))


def test_unscored_pairs_are_left_out_of_the_mean_of_a_fixed_response():
    def score(prompts, texts):
        return [None if text == "never" or prompt == 0 else 0.25 for prompt, text in zip(prompts, texts, strict=True)]

    found = best_fixed_response(score, [0, 1, 2], ["never", "sometimes"], seed=0)
    assert (found.text, found.mean) == ("sometimes", 0.25)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_sign_of_the_correlation_with_length(sign):
    table = pd.DataFrame({"prompt_index": range(20), "completion": ["word " * (n + 1) for n in range(20)]})
    found = length_correlation(table.assign(x=[sign * n**3 for n in range(20)]), "x", seed=0)
    assert found.value == pytest.approx(sign)
    assert found.low == pytest.approx(sign)
    assert found.high == pytest.approx(sign)


def test_the_interval_of_unrelated_scores_holds_0():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"prompt_index": np.repeat(range(50), 2), "x": rng.random(100),
                          "completion": ["word " * n for n in rng.integers(1, 9, 100)]})  # fmt: skip
    found = length_correlation(table, "x", seed=0)
    assert found.low < 0 < found.high
    assert found.low < found.value < found.high


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert np.isnan(rank_correlation([1], [1]))


def test_a_collapsed_policy_is_all_near_duplicates_with_one_opening():
    found = sameness(["You feel it.", "you feel it."] * 3)
    assert found.near_duplicates == 1.0
    assert (found.distinct_openings, found.opening, found.opening_share) == (1 / 6, "you feel it.", 1.0)


def test_different_answers_have_no_twin():
    found = sameness([answer.format("boss") for answer in ANSWERS.values()])
    assert (found.near_duplicates, found.distinct_openings) == (0.0, 1.0)


def test_openings_see_what_near_duplicates_and_distinct_completions_miss():
    endings = ["a walk", "talking to her at work on Monday morning", "to see what others say", "less wine"]
    found = sameness([f"Have you tried {ending}?" for ending in endings])
    assert found.near_duplicates == 0.0
    assert (found.opening, found.opening_share, found.distinct_openings) == ("have you tried", 1.0, 0.25)


def test_one_word_in_six_keeps_a_near_duplicate_and_two_do_not():
    assert sameness(["a b c d e f", "a b c d e x"]).near_duplicates == 1.0
    assert sameness(["a b c d e f", "a b c d x y"]).near_duplicates == 0.0


def test_one_output_and_empty_outputs_are_measured():
    assert sameness(["a"]).near_duplicates == 0.0
    assert sameness(["", ""]).near_duplicates == 1.0
