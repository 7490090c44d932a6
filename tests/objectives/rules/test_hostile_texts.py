"""Readers take their time in proportion to the text: 100 kB of what makes patterns go back is read at once."""

import time

import pytest

from emorl.evaluation.text_metrics import distinct_2, repeated_trigrams
from emorl.objectives.rules.exact_match import ExactMatch
from emorl.objectives.rules.multiple_choice import chosen_letter
from emorl.objectives.rules.numeric_answer import last_number, reference_number

SIZE = 100_000
HOSTILE = [
    "#", "answer is ", "answer is 1.", "1", "1,", "1 ", "1 000 ", "1/", "1^", "1e", ".1", "=1", "- 1 ", "-", "$", "_", "{",
    "\\frac{", "\\boxed", "x+1", " ", "\n", "A,", "A ", "(", "A)", "A(((((((", "answer is (", "A. ", "not ", "B is ", "(a)",
    "> ", "*", "answer: \n", "\n(((((((", "\nA.......", "A is not ", "the ", "<think>", "</think>", "`", "答案是",
]  # fmt: skip
READERS = {
    "last_number": last_number,
    "reference_number": reference_number,
    "chosen_letter": lambda text: chosen_letter(text, 4),
    "exact_match": lambda text: ExactMatch(answer_column="key", match="contains")(["p"], [text], key=["42"]),
    "distinct_2": lambda text: distinct_2([text]),
    "repeated_trigrams": lambda text: repeated_trigrams([text]),
}


@pytest.mark.parametrize("opening", ["", "answer is"])
@pytest.mark.parametrize("piece", HOSTILE)
@pytest.mark.parametrize("reader", READERS)
def test_a_long_text_is_read_in_no_time(reader, piece, opening):
    """Quadratic readers took 8 to 25 s for a fifth of it; the bound is ten times what an idle machine needs."""
    text = opening + piece * (SIZE // len(piece))
    start = time.process_time()
    READERS[reader](text)
    assert time.process_time() - start < 0.5
