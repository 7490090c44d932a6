import pytest
from datasets import Dataset

from emorl.config import UserError
from emorl.evaluation.attacks import scores_of_rows
from emorl.objectives.loading import Objective


def test_an_objective_that_breaks_on_an_attack_is_named():
    objective = Objective("fragile", lambda prompts, completions, **_: [1 / len(text) for text in completions])
    scores = scores_of_rows(objective, Dataset.from_dict({"prompt": ["p", "q"]}))
    assert scores([1, 0], ["ab", "abcd"]) == [0.5, 0.25]
    with pytest.raises(UserError, match=r"'fragile' raised ZeroDivisionError .*evaluate\.attacks=false"):
        scores([0], [""])
