"""The checker finds what it says it looks for, in functions made to break, and nothing in our own."""

import itertools

import pytest
from transformers import BertConfig, BertForSequenceClassification

from emorl.config.objective import TransformConfig
from emorl.objectives import registered
from emorl.objectives.catalogue import catalogue
from emorl.objectives.check import TOGETHER, check_edge_cases
from emorl.objectives.loading import Objective
from emorl.objectives.models.classifier import Classifier
from emorl.objectives.models.likelihood import Likelihood
from emorl.objectives.scale import declared_range, resolve

CHAT = {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "I am sad."}], "topic": "grief"}
TEXT = {"prompt": "I am sad.", "topic": "grief"}
COUNTER = itertools.count()


def problems(function, row=TEXT, bounds=None):
    """Case -> problems of the cases that have any."""
    result = check_edge_cases(Objective("x", function, resolve(None, bounds)), row)
    found = {case.case: " ".join(case.problems) for case in result.cases if case.problems}
    assert result.passed == (not found)
    return found


def by_text(score):
    """An objective from a function of one text."""
    return lambda prompts, completions, **columns: [score(text) for text in completions]


@pytest.mark.parametrize("row", [CHAT, TEXT], ids=["conversation", "text"])
@pytest.mark.parametrize("name", [entry.name for entry in catalogue() if not entry.needs])
def test_every_rule_passes_in_both_formats(name, row):
    result = check_edge_cases(Objective(name, registered(name)(), resolve(None, declared_range(registered(name)))), row)
    assert [case for case in result.cases if case.problems] == []
    assert not result.other_format.problems
    assert len(result.cases) >= 17
    assert all(case.score == case.raw for case in result.cases)


@pytest.mark.parametrize("row", [CHAT, TEXT], ids=["conversation", "text"])
@pytest.mark.parametrize("kind", ["classifier", "likelihood"])
def test_models_pass_with_5000_words_in_64_positions(kind, row, make_causal_model, tokenizer, tmp_path):
    if kind == "likelihood":
        make_causal_model("gpt2", n_positions=64).save_pretrained(tmp_path)
    else:
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = BertConfig(vocab_size=300, max_position_embeddings=64, num_labels=1, **small)
        BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    objective = Classifier(str(tmp_path)) if kind == "classifier" else Likelihood(str(tmp_path), scale="inverse")
    result = check_edge_cases(Objective(kind, objective, resolve(None, declared_range(objective))), row)
    assert [case for case in result.cases if case.problems] == []


def test_an_error_is_one_line_at_its_case():
    found = problems(by_text(lambda text: float(text[0].isalpha())))
    assert list(found) == ["empty"]
    assert "raised IndexError at test_check.py:" in found["empty"]
    assert found["empty"].endswith(": string index out of range")
    (line,) = set(problems(by_text(lambda text: int("1\n2", 3) if text else 0)).values())
    assert "\n" not in line
    assert "raised ValueError at test_check.py:" in line
    assert ": invalid literal" in line


def test_no_number_and_numbers_outside_the_range_are_found():
    assert "returned nan for completion 0" in problems(by_text(lambda text: float("nan") if not text else 0.0))["empty"]
    words = problems(by_text(lambda text: len(text.split()) / 100), bounds=(0.0, 1.0))
    assert words["5,000 words"] == "raw score 50 is outside the range [0, 1]"
    assert problems(by_text(lambda text: len(text.split()) / 100)) == {}  # no range declared, none made up


def test_scores_that_change_from_call_to_call_or_with_their_batch_are_found():
    changing = problems(lambda prompts, completions, **columns: [float(next(COUNTER)) for _ in completions])
    assert changing["normal"].startswith("another score when asked again: ")
    ranked = problems(lambda prompts, completions, **columns: [position / 100 for position, _ in enumerate(completions)])
    assert ranked["empty"] == "another score in a batch: 0.0 alone, 0.01 with others"
    assert "normal" not in ranked
    assert problems(lambda prompts, completions, **columns: [position * 1e-6 for position, _ in enumerate(completions)]) == {}


def test_a_function_that_takes_no_batches_is_found():
    def single(prompts, completions, **columns):
        (text,) = completions
        return [float(len(text))]

    found = problems(single)
    assert list(found) == [TOGETHER]
    assert "raised ValueError at test_check.py:" in found[TOGETHER]
    assert ": too many values to unpack" in found[TOGETHER]


def test_none_is_allowed_and_columns_reach_the_function():
    def topical(prompts, completions, topic, **columns):
        assert topic == ["grief"] * len(completions)
        return [None] * len(completions)

    assert problems(topical) == {}


def test_the_format_that_the_base_does_not_use_may_fail():
    def chat_only(prompts, completions, **columns):
        return [float(completion[0]["content"] == "") for completion in completions]

    result = check_edge_cases(Objective("x", chat_only), CHAT)
    assert result.passed
    assert "TypeError" in result.other_format.problems[0]
    assert not check_edge_cases(Objective("x", chat_only), TEXT).passed


def test_scores_are_on_the_objectives_scale():
    scale = resolve(TransformConfig(range=(0, 2), log=True), None)
    result = check_edge_cases(Objective("x", by_text(lambda text: 1.0), scale), TEXT)
    assert {(case.raw, case.score) for case in result.cases} == {(1.0, 0.5)}
    assert result.scale == str(scale)
