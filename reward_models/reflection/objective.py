"""The reflection objective."""

from reward_models.guarded import Guarded


class Reflection(Guarded):
    """Scores in [0, 1]: complex reflection of this client 1, simple 0.5, anything else 0; `model` is the folder that
    `reward_models.reflection.train` wrote."""
