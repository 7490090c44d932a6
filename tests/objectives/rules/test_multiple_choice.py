"""Completions and the letter they settle on, by hand; answers of every kind; attacks that name several."""

import pytest

from emorl.config import UserError
from emorl.config.experiment import ObjectiveConfig
from emorl.objectives.check import check_edge_cases
from emorl.objectives.loading import load_objective
from emorl.objectives.rules.multiple_choice import MultipleChoice, chosen_letter


@pytest.mark.parametrize(
    "text",
    [
        *("B", "b", "(B)", "(b)", "B.", "b)", "**B**", "[B]", " B \n", "Ｂ"),
        *("B. Paris", "B) Paris", "b) Paris", "B: Paris", "B - Paris", "(b) Paris", "B. A dog", "B. A Tale of Two Cities"),
        *("Answer: B", "answer: b", "ANSWER: B", "**Answer:** B", "Answer:\n(B) Paris", "Answer: B) Paris", "Option B"),
        *(
            "The answer is B.",
            "the answer is (b)",
            "The correct answer is option B because A has no sea.",
            "\\boxed{\\text{B}}",
        ),
        *("B is correct", "Option B is the right one.", "I choose B, I think.", "答案是B。", "答案：Ｂ", "故选B"),
        *("A is wrong, so the answer is B.", "not A but B", "B, not C", "A isn't right and C is incorrect: B"),
        *("The answer is B. C would need more.", "A looks good at first.\nD too.\n\nB", "Answer: B. Vitamin A"),
        *("<think>A? C? The answer is D.</think>B", "I am told that a dog barks: B", "B cells", "B. Washington D.C."),
    ],
)
def test_a_settled_letter_is_found(text):
    assert chosen_letter(text, 4) == "B"


@pytest.mark.parametrize(
    "text",
    [
        *("", "Paris", "a dog", "A dog", "the answer is a dog", "It's a plan", "ABCD", "A+", "B-cells", "A1", "E", "x\x00"),
        *("A B C D", "A, B, C, D", "A. B. C. D.", "(A)(B)(C)(D)", "A/B", "A\nB\nC\nD", "a\nb", "Both A and B", "A or B"),
        *("A) Paris\nB) Rome", "A. Paris B. Rome", "(a) Paris (b) Rome", "A. No, B."),
        *("The answer is A or B.", "The answer is A, B and C", "The answer is A. B. C.", "answer: a, b", "A or B is correct"),
        *("The answer is A. The answer is B.", "Answer: A\nAnswer: B", "\\boxed{A} \\boxed{B}", "B\n\nQuestion: …\nAnswer: C"),
        *("not B", "The answer is not B.", "B is wrong", "neither A nor B", "C. Vitamin A", "<think>The answer is A.</think>"),
    ],
)
def test_no_letter_and_several_are_no_answer(text):
    assert chosen_letter(text, 4) is None


def test_letters_beyond_the_choices_are_not_read():
    assert chosen_letter("B. E. coli", 4) == "B"
    assert chosen_letter("B or E", 5) is None
    assert [chosen_letter(text, 10) for text in ("J", "I", "(i)", "I think so", "The answer is I because")] == [
        *("J", "I", "I"),
        *(None, "I"),
    ]


@pytest.mark.parametrize("answer", ["B", "b", " B ", 1])
def test_answers_are_letters_or_indices_from_0(answer):
    texts = ["B", "C", "B or C", ""]
    assert MultipleChoice(4)(["p"] * 4, texts, answer=[answer] * 4) == [1.0, 0.0, 0.0, 0.0]


def test_each_completion_meets_its_own_answer_as_text_and_as_a_conversation():
    objective = load_objective(
        "right", ObjectiveConfig(function="multiple_choice", options={"choices": 4, "answer_column": "key"})
    )
    texts, keys = ["A", "The answer is (D).", "C"], [0, "D", "B"]
    turns = [[{"role": "assistant", "content": text}] for text in texts]
    assert objective(["p"] * 3, texts, key=keys) == objective(["p"] * 3, turns, key=keys) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "text", ["A B C D", "A", "Answer: A, B, C or D", "A" * 99, "The answer is A. " * 9, "ABCD\nA\nB\nC\nD"]
)
def test_one_text_for_every_question_earns_at_most_chance(text):
    assert sum(MultipleChoice(4)(["p"] * 4, [text] * 4, answer=[0, 1, 2, 3])) <= 1.0


@pytest.mark.parametrize("prompt", ["Which?", [{"role": "user", "content": "Which?"}]])
def test_it_passes_the_checks_of_edge_cases(prompt):
    objective = load_objective("right", ObjectiveConfig(function="multiple_choice", options={"choices": 4}))
    result = check_edge_cases(objective, {"prompt": prompt, "answer": "B"})
    assert result.passed
    assert not result.other_format.problems


@pytest.mark.parametrize("answer", ["E", "", None, 4, -1, True, 1.0, "1", "AB", float("nan")])
def test_an_answer_that_is_none_is_named(answer):
    with pytest.raises(UserError, match=r"completion 1 has .* in column 'answer'; expected a letter A to D or an index 0 to 3"):
        MultipleChoice(4)(["p"] * 2, ["B"] * 2, answer=["B", answer])


def test_a_missing_column_and_impossible_choices_are_refused():
    with pytest.raises(UserError, match=r"needs the data's column 'answer'.*did you mean 'answers'"):
        MultipleChoice(4)(["p"], ["B"], answers=["B"])
    for choices in (1, 11):
        with pytest.raises(ValueError, match="expected 2 to 10 choices"):
            MultipleChoice(choices)
