"""Which models write together: LoRA policies of one base, or whole models with tokenizers of their own. Free of torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from emorl.config import UserError
from emorl.config.experiment import BaseConfig
from emorl.config.objects import is_object
from emorl.runs.layout import ADAPTER


@dataclass(frozen=True)
class Models:
    """Where the adapters or the whole models are, by name in the order of the weights.

    Args:
        base: of the adapters; whole models are loaded as it is, each from its own place.
        vocabulary, top_k: how whole models are mixed, as in `DynamicConfig`.
        system_prompt: with which the adapters are asked.
        chat_template_kwargs: what the chat templates are told.
    """

    places: Mapping[str, str]
    base: BaseConfig
    vocabulary: Literal["top_k", "full"] = "top_k"
    top_k: int = 10
    system_prompt: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    @property
    def share_base(self) -> bool:
        """Whether all of them are adapters of the base."""
        return all(map(_is_adapter, self.places.values()))


def check_together(models: Models) -> None:
    """Refuses models that cannot write together whatever is in them.

    Raises:
        UserError: fewer than two, adapters mixed with whole models, a system prompt for whole models, a base that is loaded
            already: what is saved refers to it.
    """
    places = models.places
    if is_object(models.base.model) or is_object(models.base.tokenizer or ""):
        raise UserError(
            "base: a dynamic ensemble refers to its base and tokenizer; give folders or hub ids, not what is loaded"
        )
    if len(places) < 2:
        raise UserError(f"a dynamic ensemble needs at least two models, and here is {', '.join(places)}; see dynamic.models")
    whole = [name for name, place in places.items() if not _is_adapter(place)]
    if 0 < len(whole) < len(places):
        adapter = next(name for name in places if name not in whole)
        raise UserError(
            f"dynamic.models: {adapter} is a LoRA adapter of the base and {whole[0]} a model of its own; give adapters "
            "only, or whole models only"
        )
    if whole and models.system_prompt:
        raise UserError("data.system_prompt: different models have templates of their own; write it into the prompts")


def _is_adapter(place: str) -> bool:
    return (Path(place) / ADAPTER).is_file()
