"""The specificity objective."""

from reward_models.guarded import Guard


class ResponseSpecificity(Guard):
    """Scores in [0, 1]: P(these words were said to this person rather than to another one), less what is copied; `model` is the
    folder that `reward_models.specificity.train` wrote."""
