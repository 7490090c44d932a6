"""Pieces of a text are together the whole text, whatever stops it, whatever it begins behind."""

import random

import pytest

from emorl.policies.conversation import answer_in
from emorl.serving.writing import TextWriter

TEXTS = [
    "hello",
    "größer — als 🙂 das",
    "  spaces at both ends \n",
    "",
    "a\n\nb",
    "日本語のテキスト",
    "\N{REPLACEMENT CHARACTER}!",
]


def written(tokenizer, text, **options):
    """(pieces, reasoning) of a text, token by token; both joined."""
    writer = TextWriter(tokenizer, **options)
    pieces = []
    for token in tokenizer(text)["input_ids"]:
        pieces.append(writer.add(token))
        if writer.has_stopped:
            break
    pieces.append(writer.end())
    return "".join(piece.text for piece in pieces), "".join(piece.reasoning for piece in pieces), pieces, writer


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_together_the_text(tokenizer, text):
    assert written(tokenizer, text)[0] == text
    assert written(tokenizer, text, strip=True)[0] == text.strip()


def test_a_piece_never_ends_within_a_character(tokenizer):
    pieces = written(tokenizer, "größer 🙂")[2]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece.text for piece in pieces)


def test_a_cut_character_is_told_at_the_end(tokenizer):
    writer = TextWriter(tokenizer)
    first = tokenizer("🙂")["input_ids"][0]
    assert writer.add(first).text + writer.end().text == tokenizer.decode([first])


@pytest.mark.parametrize("stop", [["lo w"], ["xyz", "wor"], ["o"], ["ld"], ["hello world"], ["nothing"]])
def test_a_text_ends_before_the_first_stop_string(tokenizer, stop):
    text = "hello world"
    places = [text.find(each) for each in stop if each in text]
    found, _, _, writer = written(tokenizer, text, stop=stop)
    assert found == (text[: min(places)] if places else text)
    assert writer.has_stopped == bool(places)
    assert all(each not in found for each in stop)


def test_what_may_begin_a_stop_string_is_held_back_until_it_does_not(tokenizer):
    pieces = [piece.text for piece in written(tokenizer, "aabaac", stop=["aac"])[2]]
    assert "".join(pieces) == "aab"
    assert pieces[:2] == ["", ""]


@pytest.mark.parametrize("text", ["thoughts</t> answer ", "no mark at all", "</t>at once", " a </t>\n\n", "x</t>y z"])
def test_answers_begin_behind_the_mark_as_in_evaluation(tokenizer, text):
    found, reasoning, *_ = written(tokenizer, text, after="</t>", strip=True)
    assert found == answer_in(text, "</t>")
    assert reasoning == text.split("</t>")[0].strip()


def test_bytes_that_never_become_a_character_are_told_in_time(tokenizer):
    token = tokenizer("🙂")["input_ids"][0]
    writer = TextWriter(tokenizer)
    pieces = [writer.add(token).text for _ in range(100)]
    assert sum(map(bool, pieces)) >= 10
    assert "".join(pieces) + writer.end().text == tokenizer.decode([token] * 100)


def test_random_texts_stops_and_marks_agree_with_what_is_known_of_the_whole(tokenizer):
    chance = random.Random(0)
    for _ in range(300):
        text = "".join(chance.choice("ab <>\n") for _ in range(chance.randrange(20)))
        stop = ["".join(chance.choice("ab <>\n") for _ in range(chance.randrange(1, 4))) for _ in range(2)]
        places = [text.find(each) for each in stop if each in text]
        whole = text[: min(places)] if places else text
        assert written(tokenizer, text, stop=stop)[0] == whole
        assert written(tokenizer, text, stop=stop, strip=True)[0] == whole.strip()
