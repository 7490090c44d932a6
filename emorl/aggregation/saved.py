"""A mixture of policies in a folder that can be copied alone: adapters, tokenizer and front lie in it, the base is named.

`ensemble.json` says how the policies are combined and which base they belong to: by hub id, by its folder (relative to this one
and absolute), and by its fingerprint; one that was made in memory by the fingerprint alone. It is not called `config.json`, so
that `AutoTokenizer.from_pretrained` takes the folder as that of a tokenizer.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emorl.config import UserError
from emorl.config.experiment import BaseConfig
from emorl.objectives.preference import choose
from emorl.policies.adapters import Adapter, base_fingerprint, read_adapter
from emorl.policies.base import load_model
from emorl.policies.loading import GGUF, read_tokenizer
from emorl.runs.layout import ADAPTER, ENSEMBLE_CARD, FRONT, POLICY_CARD, WEIGHTS
from emorl.runs.run import read_json, write_json, written_whole_directory

Front = Sequence[Mapping[str, Any]]
"""points with `weights`, `scores` and `value`, as a search finds them"""


def reference_to(place: str, folder: Path) -> dict[str, str] | None:
    """How a folder's file refers to a model: a folder or GGUF file by both paths, a hub id by itself; None for what is neither,
    such as a model made in memory."""
    path = Path(place).resolve()
    if place and (path.is_dir() or (path.suffix == GGUF and path.is_file())):
        return {"relative": os.path.relpath(path, folder), "absolute": str(path)}
    try:
        validate_repo_id(place.rpartition("/")[0] if place.endswith(GGUF) else place)
    except HFValidationError:
        return None
    return {"hub": place}


def located(reference: Mapping[str, str] | None, folder: Path, what: str, remedy: str = "save the ensemble anew") -> str:
    """Where a model is that `reference_to` referred to: its relative path counts first, then the absolute one.

    Raises:
        UserError: it has gone, or was made in memory.
    """
    if reference is None:
        raise UserError(f"{folder} belongs to a {what} without a folder or hub id, as if made in memory; {remedy}")
    if "hub" in reference:
        return reference["hub"]
    places = dict.fromkeys([(folder / reference["relative"]).resolve(), Path(reference["absolute"])])
    for place in places:
        if place.exists():
            return str(place)
    where = " or ".join(map(str, places))
    raise UserError(f"{folder} refers to the {what} in {where}, which has gone; put it back, or {remedy}")


def save(
    folder: Path,
    settings: Mapping[str, Any],
    adapters: Mapping[str, Path],
    tokenizer: PreTrainedTokenizerBase | None,
    front: Front | None,
) -> None:
    """Writes a mixture, whole or not at all, also under `kill -9`; one that was saved there before is replaced.

    Args:
        settings: for `ensemble.json`.

    Raises:
        ValueError: the folder holds something else, or an adapter has no files.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / ENSEMBLE_CARD).is_file():
        raise ValueError(f"{folder} holds other files; give a folder of its own to the ensemble.")
    for name, adapter in adapters.items():
        if not ((adapter / ADAPTER).is_file() and (adapter / WEIGHTS).is_file()):
            raise UserError(f"no adapter of policy {name!r} lies in {adapter}; write it there, as concatenate_adapters() does")
    former = folder.with_name(f".{folder.name}.former")  # a large folder takes time to remove; a rename does not
    shutil.rmtree(former, ignore_errors=True)
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
        if folder.is_dir():
            os.replace(folder, former)
    shutil.rmtree(former, ignore_errors=True)


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
    if base is not None and options:
        raise UserError(f"base= is loaded already, so {', '.join(options)} cannot change it; leave out one of both")
    model = _load_base(folder, settings, options) if base is None else base
    if base_fingerprint(model) != settings["base_fingerprint"]:
        raise UserError(
            f"{folder} was saved over another base than {model.name_or_path or 'the one given'} is now; give that one as base="
        )
    return model


def _load_base(folder: Path, settings: Mapping[str, Any], options: Mapping[str, Any]) -> PreTrainedModel:
    place = located(settings["base"], folder, "base model", "give it as base=")
    origin = {key: value for key, value in options.items() if key in ("revision", "trust_remote_code")}
    config = BaseConfig(model=place, quantization=settings.get("quantization"), **origin)
    as_saved: dict[str, Any] = {"dtype": getattr(torch, settings["dtype"])}
    if config.quantization is None:
        as_saved["device_map"] = {"": "cpu"}  # as transformers does it: whoever wants it elsewhere moves it, or says so
    try:
        return load_model(config, **{**as_saved, **options})
    except UserError as error:
        raise UserError(f"{folder}: {error}; or give it as base=") from error


def read_saved_adapters(folder: Path, scales: Mapping[str, float]) -> dict[str, Adapter]:
    """The adapters of a saved mixture by name, in policy order, each times its scale.

    Raises:
        UserError: one has gone, or is damaged.
    """
    try:
        return {name: read_adapter(folder / "adapters" / name, scale) for name, scale in scales.items()}
    except ValueError as error:
        raise UserError(str(error)) from None


def read_saved_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a saved mixture; None where none was saved."""
    return read_tokenizer(str(folder), "the tokenizer in") if (folder / "tokenizer_config.json").is_file() else None


def chosen_weights(folder: Path, saved: Sequence[float], prefer: Mapping[str, float] | None, weights: Any | None) -> Any:
    """The weights a loaded mixture begins with: those given, those of the saved front's point that suits the importance of
    objectives best, or the saved ones (K,).

    Raises:
        UserError: a preference beside weights or without a saved front, or an unknown objective.
    """
    if prefer is None:
        return saved if weights is None else weights
    if weights is not None:
        raise UserError("prefer= chooses the weights and weights= gives them; use one of both")
    if not (folder / FRONT).is_file():
        raise UserError(f"{folder} was saved without a front to prefer a point of; give weights instead")
    return choose(read_json(folder / FRONT), prefer)["weights"]
