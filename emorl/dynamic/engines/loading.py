"""The engine of some models: stacked where all are adapters of one base, else by the union of their vocabularies."""

from dataclasses import replace
from pathlib import Path

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.config import UserError
from emorl.config.experiment import BaseConfig
from emorl.dynamic.engines.engine import Engine
from emorl.dynamic.engines.stacked import StackedEngine
from emorl.dynamic.engines.union import UnionEngine
from emorl.dynamic.models import Models
from emorl.policies.base import Base, is_encoder_decoder, load_base, read_policies
from emorl.policies.prompts import is_chat, prepare_tokenizer


def load_engine(models: Models, base: Base | None = None) -> Engine:
    """Loads all of the models.

    Args:
        base: of the adapters, where it is loaded already.

    Raises:
        UserError: a model that cannot be loaded, or that cannot write with the others.
    """
    try:
        if models.share_base:
            base = base or load_base(models.base)
            prepare_tokenizer(base.tokenizer, models.chat_template_kwargs, None)
            policies = read_policies({name: Path(place) for name, place in models.places.items()}, base)
            return StackedEngine(HiddenStateEnsemble(base.model, policies), base.tokenizer)
        loaded = [load_base(_whole(models, place)) for place in models.places.values()]
        for each in filter(lambda each: is_chat(each.tokenizer), loaded):
            prepare_tokenizer(each.tokenizer, models.chat_template_kwargs, None)
        return UnionEngine(
            [each.model for each in loaded],
            [each.tokenizer for each in loaded],
            names=tuple(models.places),
            vocabulary=models.vocabulary,
            top_k=models.top_k,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def check_places(models: Models) -> None:
    """Refuses models that are not there, and whole ones that are no decoders, before the first one is loaded: UserError."""
    if models.share_base:
        is_encoder_decoder(models.base)
        return
    for name, place in models.places.items():
        try:
            is_refused = is_encoder_decoder(_whole(models, place))
        except UserError as error:
            raise UserError(str(error).replace("base.model", f"dynamic.models.{name}", 1)) from None
        if is_refused:
            raise UserError(
                f"dynamic.models.{name} {place!r} is an encoder-decoder; different models write together as decoders"
            )


def _whole(models: Models, place: str) -> BaseConfig:
    """How a whole model is loaded: as the base, but of its own place."""
    return replace(models.base, model=place, tokenizer=None, revision=None)
