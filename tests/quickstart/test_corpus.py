import random
from itertools import islice

import numpy as np
import pytest

from emorl.quickstart import corpus
from emorl.quickstart.words import CAUSES, FEELINGS

EVERY_KIND = dict.fromkeys(corpus.RESPONSES, 1.0)


@pytest.fixture(scope="module")
def dialogues():
    return list(islice(corpus.write_dialogues(0, EVERY_KIND), 3000))


@pytest.fixture(scope="module")
def judged():
    return list(islice(corpus.write_judged(0), 3000))


def test_same_seed_same_dialogues(dialogues, judged):
    assert list(islice(corpus.write_dialogues(0, EVERY_KIND), 50)) == dialogues[:50]
    assert list(islice(corpus.write_judged(0), 50)) == judged[:50]
    assert list(islice(corpus.write_dialogues(1, EVERY_KIND), 50)) != dialogues[:50]
    assert corpus.write_prompts(0, 20) == corpus.write_prompts(0, 20)


def test_prompts_are_varied_and_none_is_in_a_dialogue(dialogues, judged):
    rows = corpus.write_prompts(0, 1000)
    prompts = {row["prompt"] for row in rows}
    assert len(prompts) == 1000
    assert not prompts & {row.prompt for row in [*dialogues, *judged]}
    assert len({row.prompt for row in dialogues}) > 2900
    assert len(CAUSES) >= 12
    assert len(FEELINGS) >= 12
    assert all(row["cause"].lower() in row["prompt"].lower() and row["feeling"] in row["prompt"] for row in rows)


def test_statements_and_responses_keep_their_length(dialogues):
    lengths = [len(row.prompt.split()) for row in dialogues]
    assert 18 <= np.mean(lengths) <= 26
    assert max(len(row.response.split()) for row in dialogues) <= 24
    assert "{" not in "".join(row.prompt + row.response for row in dialogues)


def test_the_budget_sets_reflection_against_empathy(dialogues):
    labels = np.array([(row.reflection, row.empathy) for row in dialogues])
    assert np.corrcoef(labels.T)[0, 1] < -0.3
    assert labels.sum(axis=1).max() == 2


def test_a_complex_reflection_names_feeling_and_cause_and_never_the_counsellor(dialogues):
    for row in dialogues:
        if row.kind == "complex":
            assert corpus.in_second_person(row.situation.cause).lower() in row.response.lower()
            assert any(word in row.response for word in FEELINGS[row.situation.feeling])
            assert " I " not in f" {row.response}"


def test_full_empathy_names_feeling_and_topic(dialogues):
    for row in dialogues:
        if row.empathy == 2:
            assert corpus.in_second_person(row.situation.topic) in row.response
            assert any(word in row.response for word in FEELINGS[row.situation.feeling])


def test_flawed_responses_score_low(judged):
    flawed = {kind: [row for row in judged if row.kind == kind] for kind in ("mismatched", "corrupted", "crowded")}
    assert all(len(rows) > 200 for rows in flawed.values())
    assert {(row.reflection, row.empathy) for row in flawed["mismatched"]} == {(0, 0), (0, 1)}
    assert {(row.reflection, row.empathy) for row in flawed["corrupted"]} == {(0, 0)}
    assert {(row.reflection, row.empathy) for row in flawed["crowded"]} == {(1, 1)}


def test_a_mismatched_reflection_has_the_form_but_another_feeling_or_cause(judged):
    for row in judged:
        if row.kind == "mismatched" and row.response.startswith("It makes you"):
            own = corpus.in_second_person(row.situation.cause)
            words = row.response.rstrip(".").split()
            assert own not in row.response or not set(FEELINGS[row.situation.feeling]) & set(words)


def test_the_client_s_words_are_turned_to_the_client():
    assert corpus.in_second_person("my knee hurts me and I am tired") == "your knee hurts you and you are tired"


@pytest.mark.parametrize("template", [t for templates in corpus.RESPONSES.values() for t in templates])
def test_every_template_makes_a_sentence(template):
    rng = random.Random(0)
    response = corpus.respond(corpus.imagine(rng), template, rng)
    assert response[0].isupper()
    assert response[-1] in ".?"
