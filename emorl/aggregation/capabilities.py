"""What transformers asks of a model that generates, and an ensemble's base must answer: attention, experts, caches."""

import inspect
import re

from transformers import GenerationMixin, PreTrainedModel

# About our own forward, and about overridden methods of our own class.
_OF_THE_ENSEMBLE = {"_supports_mm_encoder_outputs", "_is_overridden"}

CAPABILITIES = tuple(
    name
    for name in sorted({*dir(PreTrainedModel), *dir(GenerationMixin)} - _OF_THE_ENSEMBLE)
    if re.match(r"_can_|_is_|_?supports_|_compatible_|is_backend_compatible", name)
    and not isinstance(inspect.getattr_static(PreTrainedModel, name, None), property)  # computed from the others
)
"""attributes and methods without arguments, whatever this transformers has"""
