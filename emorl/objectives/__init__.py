"""Objectives: reward functions in TRL's convention, by registry name, hub id or `package.module:attribute`.

An objective is called as `objective(prompts=…, completions=…, **columns)` and returns one score per completion
(`list[float | None]`, None for "cannot be scored"); every objective is maximised. What works in
`trl.GRPOTrainer(reward_funcs=…)` works here and the other way round. A class or function may declare its `range`;
`scale.py` says how raw scores become the scores that everything else sees.

| name | scores | range |
|---|---|---|
| classifier | probability of a label under a sequence classifier that reads prompt and completion | [0, 1] |
| likelihood | fluency: perplexity of the completion given the prompt under a causal language model | [0, 1] |
| specificity | how much better the completion fits its prompt than the prompts of a bank, by a sentence encoder | [0, 1] |
| length | 1 inside a range of words, falling to 0 outside | [0, 1] |
| repetition | 1 - share of word trigrams that repeat an earlier one | [0, 1] |
| distinct_2 | distinct word bigrams / word bigrams | [0, 1] |
| multiple_choice | 1 where the letter that the completion settles on is the data's answer, else 0 | [0, 1] |
| exact_match | 1 where the completion is a reference, or one of several, normalised; or the share of its parts | [0, 1] |
| numeric_answer | 1 where the number that the completion ends on is the reference's, else 0 | [0, 1] |
| unit_tests | 1 where the completion's code passes the data's tests in a sandbox, else 0; or the share it passes | [0, 1] |
| judge | score, or preference over a reference, by a rubric in words under a chat model, at an endpoint or local | [0, 1] |
"""

import importlib
from collections.abc import Callable
from typing import Any

REGISTRY = {
    "classifier": "emorl.objectives.models.classifier:Classifier",
    "likelihood": "emorl.objectives.models.likelihood:Likelihood",
    "specificity": "emorl.objectives.models.similarity:Specificity",
    "length": "emorl.objectives.rules.text:Length",
    "repetition": "emorl.objectives.rules.text:Repetition",
    "distinct_2": "emorl.objectives.rules.text:Distinct2",
    "multiple_choice": "emorl.objectives.rules.multiple_choice:MultipleChoice",
    "exact_match": "emorl.objectives.rules.exact_match:ExactMatch",
    "numeric_answer": "emorl.objectives.rules.numeric_answer:NumericAnswer",
    "unit_tests": "emorl.objectives.code.unit_tests:UnitTests",
    "judge": "emorl.objectives.judge.judge:Judge",
}
"""name -> class, imported when it is used: a rule needs no torch"""


def registered(name: str) -> Callable[..., Any]:
    """The class under a name of the registry."""
    module, _, attribute = REGISTRY[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
