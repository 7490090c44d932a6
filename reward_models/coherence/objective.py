"""The coherence objective."""

from reward_models.guarded import Guarded


class Coherence(Guarded):
    """Scores in [0, 1]: P(whole text by a person that follows from the prompt), guarded; `model` is the folder that
    `reward_models.coherence.train` wrote."""
