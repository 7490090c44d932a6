"""References and completions by hand, normalised as SQuAD and TriviaQA do, and what that must not make equal."""

import pytest

from emorl.config import UserError
from emorl.config.experiment import ObjectiveConfig
from emorl.objectives.check import check_edge_cases
from emorl.objectives.loading import check_objectives, load_objective
from emorl.objectives.rules.exact_match import ExactMatch


def score(text, answer, **options):
    (found,) = ExactMatch(answer_column="answer", **options)(["p"], [text], answer=[answer])
    return found


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The Beatles!", "beatles"),
        ("  the \n beatles ", "Beatles"),
        ("“U.S.”", "US"),
        ("1,500.5", "1500.5"),
        ("A", "a"),
        ("−5", "-5"),
        ("ＡＢＣ", "abc"),
        ("Straße", "STRASSE"),
        ("<think>Rome?</think>Paris", "Paris"),
        ("queen", ["Abba", "Queen"]),
    ],
)
def test_the_same_answer_written_otherwise_is_right(text, answer):
    assert score(text, answer) == 1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", "A"),
        ("", "the"),
        ("?!", "A"),
        ("1.5", "15"),
        ("-5", "5"),
        ("1/2", "12"),
        ("12:30", "1230"),
        ("Paris, France", "Paris"),
        ("Paris", "<think>Paris"),
        ("theatre", "atre"),
    ],
)
def test_another_answer_is_wrong(text, answer):
    assert score(text, answer) == 0.0


@pytest.mark.parametrize(
    ("option", "text"), [("ignore_case", "beatles"), ("ignore_punctuation", "Beatles."), ("ignore_articles", "The Beatles")]
)
def test_each_normalisation_can_be_switched_off(option, text):
    assert score(text, "Beatles") == 1.0
    assert score(text, "Beatles", **{option: False}) == 0.0


def test_the_last_line_or_a_run_of_words_may_be_the_reference():
    text = "They are from Liverpool.\n\nThe Beatles.\n \n"
    assert [score(text, "Beatles", match=match) for match in ("whole", "last_line", "contains")] == [0.0, 1.0, 1.0]
    assert score("Beatlesque", "Beatles", match="contains") == 0.0
    assert score("", "Beatles", match="last_line") == 0.0


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("19; 36; cba", 1.0),
        ("19;36;CBA;", 1.0),
        ("19; 35; cba", 2 / 3),
        ("19", 1 / 3),
        ("36; 19; cba", 1 / 3),
        ("19; 36; cba; 4; 5", 1.0),
        (";;", 0.0),
        ("", 0.0),
        ("19 36 cba", 0.0),
    ],
)
def test_parts_count_at_their_places(text, share):
    assert score(text, "19; 36; cba", separator=";") == share


def test_the_best_of_several_references_counts_for_parts():
    assert score("a1; b2", ["x; b2; y; z", "a1; c"], separator=";") == 0.5


@pytest.mark.parametrize("prompt", ["Who?", [{"role": "user", "content": "Who?"}]])
@pytest.mark.parametrize("options", [{}, {"match": "contains"}, {"match": "last_line"}, {"separator": ";"}])
def test_it_passes_the_checks_of_edge_cases(prompt, options):
    config = ObjectiveConfig(function="exact_match", options={"answer_column": "answer", **options})
    result = check_edge_cases(load_objective("right", config), {"prompt": prompt, "answer": "Paris"})
    assert result.passed
    assert not result.other_format.problems


@pytest.mark.parametrize("answer", ["", " ", None, 4, [], ["Paris", ""], ["Paris", 4], {"value": "Paris"}])
def test_an_answer_that_is_none_is_named(answer):
    with pytest.raises(UserError, match=r"completion 1 has .* in column 'answer'; expected a text, or a list of texts"):
        ExactMatch(answer_column="answer")(["p"] * 2, ["B"] * 2, answer=["B", answer])


def test_a_missing_column_is_named():
    with pytest.raises(UserError, match=r"exact_match needs the data's column 'answer' \(`answer_column`\).*mean 'answers'"):
        ExactMatch(answer_column="answer")(["p"], ["B"], answers=["B"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "option 'answer_column' is missing"),
        ({"answer_column": "answer", "seperator": ";"}, "did you mean 'separator'"),
        ({"answer_column": "answer", "separator": " "}, "expected a separator with a mark"),
        ({"answer_column": "answer", "separator": ";", "match": "contains"}, "compares parts at their places"),
        ({"answer_column": "answer", "match": "first_line"}, "match: .*'whole'.*first_line"),
        ({"answer_column": 4}, "answer_column: .*got 4"),
    ],
)
def test_impossible_options_are_refused_before_anything_runs(options, message):
    with pytest.raises(UserError, match=message):
        check_objectives({"right": ObjectiveConfig(function="exact_match", options=options)})
