from emorl.objectives import REGISTRY
from emorl.objectives.catalogue import EXAMPLE_COMPLETION, EXAMPLE_PROMPT, catalogue
from emorl.objectives.rules.text import Length


def test_every_registered_objective_says_what_it_scores_and_its_range_and_has_a_score_or_says_what_it_needs():
    entries = catalogue()
    assert [entry.name for entry in entries] == list(REGISTRY)
    for entry in entries:
        assert entry.scores
        assert entry.range is not None
        assert (entry.example is None) == bool(entry.needs)
        if entry.example is not None:
            assert entry.range[0] <= entry.example <= entry.range[1]


def test_the_examples_are_computed_and_right_by_hand():
    examples = {entry.name: entry.example for entry in catalogue()}
    assert examples["length"] == Length()([EXAMPLE_PROMPT], [EXAMPLE_COMPLETION])[0] == 1.0  # 9 words
    assert examples["repetition"] == 6 / 7  # "you sleep badly" twice among 7 trigrams
    assert examples["distinct_2"] == 6 / 8
    assert examples["classifier"] is None


def test_what_is_needed_and_what_has_a_default():
    likelihood = next(entry for entry in catalogue() if entry.name == "likelihood")
    assert likelihood.needs == ("model",)
    assert likelihood.options["ceiling"] == 50.0
    assert "model" not in likelihood.options
