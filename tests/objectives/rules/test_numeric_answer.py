"""Numbers as people and models write them, by hand; which of several counts."""

from fractions import Fraction

import pytest

from emorl.config import UserError
from emorl.config.experiment import ObjectiveConfig
from emorl.objectives.check import check_edge_cases
from emorl.objectives.loading import check_objectives, load_objective
from emorl.objectives.rules.numeric_answer import NumericAnswer, last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        ("It is 42.", 42),
        ("1,234,567.5 people", "1234567.5"),
        ("1,00,000", 100000),
        ("1, 2,3", 3),
        ("-3", -3),
        ("−3", -3),
        ("5-3", 3),
        ("x = -3.", -3),
        ("covid-19", 19),
        ("-$5.50", "-5.5"),
        ("$-5", -5),
        ("€1,200", 1200),
        ("40%", 40),
        (".5", "0.5"),
        ("wait...42", 42),
        ("3/4", "3/4"),
        ("1 1/2", "3/2"),
        ("1½", "3/2"),
        ("½", "1/2"),
        ("-\\frac{1}{2}", "-1/2"),
        ("1\\frac{1}{2}", "3/2"),
        ("2e3", 2000),
        ("**42**", 42),
        ("5kg", 5),
        ("4 of x2", 4),
        ("$1{,}000$", 1000),
        ("４２", 42),
        ("<think>7</think>8", 8),
        ("7 then 1/0", 7),
        ("\\frac{-3}{4}", "-3/4"),
        ("-\\frac12", "-1/2"),
        ("10^3", 1000),
        ("10^{-2}", "1/100"),
        ("2**10", 1024),
        ("2 \\times 10^3", 2000),
        ("3 × 10^-2", "3/100"),
        ("1 000", 1000),
        ("1\u202f000\u202f000", 1000000),
        ("- 1/2", "-1/2"),
        ("= - 3", -3),
        ("- 5 apples\n- 3 pears", 3),
        ("It is 1/2.", "1/2"),
        ("x = -5", -5),
        ("90^\\circ", 90),
        ("**-4**", -4),
    ],
)
def test_a_number_is_read_however_it_is_written(text, number):
    assert last_number(text) == Fraction(number)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 7 = 42\n#### 42", 42),
        ("#### 42 (in 3 steps)", 42),
        ("#### 1\n#### 2", 2),
        ("The answer is 42. It took 5 minutes.", 42),
        ("The answer is 3 + 4 = 7.", 7),
        ("THE ANSWER IS: $42", 42),
        ("Answer:\n42\n9", 42),
        ("\\boxed{42} and 9", 42),
        ("\\boxed{-\\frac{3}{4}}", "-3/4"),
        ("The answer is forty-two, from 6 and 7", 6),
        ("I made 7. ####", 7),
        ("İ answer is 5, not 6", 5),
        ("Answer: 42 = 7 * 6", 42),
        ("Answer: x = 7 * 6 = 42", 42),
        ("The answer is - 1/2.", "-1/2"),
        ("answer: 4 = \\sqrt{16}", 4),
        ("#### 1 000", 1000),
    ],
)
def test_the_number_after_the_last_marker_counts_or_else_the_last(text, number):
    assert last_number(text) == Fraction(number)


@pytest.mark.parametrize(
    "text",
    ["2\\sqrt{3}", "x^2+1", "2x", "x+1", "1 + x", "3\\pi", "\\pi/4", "\\frac{\\sqrt{3}}{2}", "√2", "2√2", "e^2", "2^x", "3:4",
     "|-3|"],
)  # fmt: skip
def test_a_number_inside_an_expression_with_symbols_is_none(text):
    assert last_number(text) is None
    with pytest.raises(UserError, match="expected a number"):
        NumericAnswer(answer_column="key")(["p"], ["2"], key=[text])


@pytest.mark.parametrize("text", ["5-3", "(3, 5)", "1, 2", "2 + 2", "-(-3)", "1 2 3"])
def test_a_reference_that_is_a_formula_of_several_numbers_is_refused(text):
    with pytest.raises(UserError, match="expected a number"):
        NumericAnswer(answer_column="key")(["p"], ["2"], key=[text])


def test_a_calculation_without_its_result_answers_nothing():
    assert last_number("The answer is 3 + 4") is None


@pytest.mark.parametrize("text", ["", "none", "x2", "####", "1/0", "9" * 400, "-", "$"])
def test_no_number_is_none(text):
    assert last_number(text) is None


def test_without_markers_the_last_number_counts():
    assert last_number("The answer is 42. It took 5 minutes.", ()) == 5


def test_numbers_are_compared_exactly_or_within_the_tolerance():
    texts, answers = ["1/2", "3.33", "0.30000000000000004", "50%", "42 or 43", ""], [0.5, "10/3", 0.3, 0.5, "#### 42", 0]
    assert NumericAnswer(answer_column="key")(["p"] * 6, texts, key=answers) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert NumericAnswer(answer_column="key", tolerance=0.1)(["p"] * 2, ["3.1", "3.11"], key=[3, 3]) == [1.0, 0.0]


def test_a_reference_is_read_as_a_completion_is():
    reference = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = 72 altogether.\n#### 1,072"
    assert NumericAnswer(answer_column="answer")(["p"] * 2, ["It is 1072.", "72"], answer=[reference] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("prompt", ["How many?", [{"role": "user", "content": "How many?"}]])
def test_it_passes_the_checks_of_edge_cases(prompt):
    config = ObjectiveConfig(function="numeric_answer", options={"answer_column": "answer"})
    result = check_edge_cases(load_objective("right", config), {"prompt": prompt, "answer": "#### 1"})
    assert result.passed
    assert not result.other_format.problems


@pytest.mark.parametrize("answer", ["", "none", None, True, float("nan"), float("inf"), ["42"]])
def test_an_answer_that_is_none_is_named(answer):
    with pytest.raises(UserError, match=r"completion 1 has .* in column 'answer'; expected a number, or a text with one"):
        NumericAnswer(answer_column="answer")(["p"] * 2, ["4"] * 2, answer=[4, answer])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer_column": "answer", "tolerance": -1}, "tolerance: .*got -1"),
        ({"answer_column": "answer", "markers": [""]}, "expected markers with text"),
        ({"answer_column": "answer", "markers": "####"}, "markers: .*####"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        check_objectives({"right": ObjectiveConfig(function="numeric_answer", options=options)})


def test_a_missing_column_is_named():
    with pytest.raises(UserError, match=r"numeric_answer needs the data's column 'answer'.*mean 'answers'"):
        NumericAnswer(answer_column="answer")(["p"], ["4"], answers=["4"])
