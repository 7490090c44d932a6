"""A mixture of policies in a folder that can be copied alone: adapters, tokenizer and front lie in it, the base is named.

`ensemble.json` says how the policies are combined and which base they belong to: by hub id, by its folder (relative to this one
and absolute), and by its fingerprint; one that was made in memory by the fingerprint alone.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from emorl.config import UserError
from emorl.objectives.preference import choose
from emorl.policies.adapters import Adapter, base_fingerprint, read_adapter
from emorl.runs.layout import ADAPTER, ENSEMBLE_CARD, FRONT, POLICY_CARD, WEIGHTS
from emorl.runs.run import read_json, write_json, written_whole_directory

Front = Sequence[Mapping[str, Any]]
"""points with `weights`, `scores` and `value`, as a search finds them"""


def reference_to(place: str, folder: Path) -> dict[str, str] | None:
    """How a folder's file refers to a model: a folder by both paths, a hub id by itself; None for one made in memory."""
    if not place:
        return None
    path = Path(place).resolve()
    return {"relative": os.path.relpath(path, folder), "absolute": str(path)} if path.is_dir() else {"hub": place}


def located(reference: Mapping[str, str], folder: Path, what: str) -> str:
    """Where a model is that `reference_to` referred to.

    Raises:
        UserError: it has gone.
    """
    if "hub" in reference:
        return reference["hub"]
    places = [(folder / reference["relative"]).resolve(), Path(reference["absolute"])]
    for place in places:
        if place.is_dir():
            return str(place)
    raise UserError(f"{folder} refers to the {what} in {places[0]}, which has gone; put it back, or give it when you load")


def save(
    folder: Path,
    settings: Mapping[str, Any],
    adapters: Mapping[str, Path],
    tokenizer: PreTrainedTokenizerBase | None,
    front: Front | None,
) -> None:
    """Writes a mixture, whole or not at all; one that was saved there before is replaced.

    Args:
        settings: for `ensemble.json`.

    Raises:
        ValueError: the folder holds something else.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / ENSEMBLE_CARD).is_file():
        raise ValueError(f"{folder} holds other files; give a folder of its own to the ensemble.")
    with written_whole_directory(folder) as partial:
        for name, adapter in adapters.items():
            home = partial / "adapters" / name
            home.mkdir(parents=True)
            for file in (ADAPTER, WEIGHTS, POLICY_CARD):
                if file != POLICY_CARD or (adapter / file).is_file():
                    shutil.copyfile(adapter / file, home / file)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if front is not None:
            write_json(partial / FRONT, list(front))
        write_json(partial / ENSEMBLE_CARD, settings)
        shutil.rmtree(folder, ignore_errors=True)


def read_settings(folder: Path, kind: str) -> dict[str, Any]:
    """What `ensemble.json` says of a mixture of this kind.

    Raises:
        UserError: there is none, or one of another kind.
    """
    if not (folder / ENSEMBLE_CARD).is_file():
        raise UserError(
            f"{folder} holds no {ENSEMBLE_CARD}; give the folder of a saved ensemble, such as runs/mine/search/ensemble"
        )
    settings = read_json(folder / ENSEMBLE_CARD)
    if settings["combination"] != kind:
        raise UserError(f"{folder} holds a {settings['combination']}, not a {kind}; load it with {settings['combination']}")
    return settings


def load_base_of(
    folder: Path, settings: Mapping[str, Any], base: PreTrainedModel | None, options: Mapping[str, Any]
) -> PreTrainedModel:
    """The base that a saved mixture belongs to: the one given, or the one it refers to.

    Raises:
        UserError: it has gone, or its parameters are not those the policies were trained on.
    """
    if base is None and settings["base"] is None:
        raise UserError(f"{folder} belongs to a base that was made in memory; give that one as base=")
    model = base if base is not None else _load_base(located(settings["base"], folder, "base model"), settings, options)
    if base_fingerprint(model) != settings["base_fingerprint"]:
        raise UserError(
            f"{folder} was saved over another base than {model.name_or_path or 'the one given'} is now; give that one"
        )
    return model


def _load_base(place: str, settings: Mapping[str, Any], options: Mapping[str, Any]) -> PreTrainedModel:
    kind = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(place).is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(place, **{"dtype": getattr(torch, settings["dtype"]), **options})


def read_saved_adapters(folder: Path, scales: Mapping[str, float]) -> dict[str, Adapter]:
    """The adapters of a saved mixture by name, in policy order, each times its scale."""
    return {name: read_adapter(folder / "adapters" / name, scale) for name, scale in scales.items()}


def preferred_weights(folder: Path, preferences: Mapping[str, float]) -> Mapping[str, float]:
    """Weights of the saved front's point that suits preferences by objective best.

    Raises:
        UserError: no front was saved, or an unknown objective.
    """
    if not (folder / FRONT).is_file():
        raise UserError(f"{folder} was saved without a front to prefer a point of; give weights instead")
    return choose(json.loads((folder / FRONT).read_text()), preferences)["weights"]
