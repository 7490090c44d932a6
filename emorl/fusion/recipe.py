"""From settings to tensors: what `emorl fuse` does with a file of whole checkpoints, ours or mergekit's."""

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from emorl.config import UserError
from emorl.config.fuse import CheckpointsFile
from emorl.config.yaml import as_mapping
from emorl.fusion.checkpoints import (
    CheckpointFusion,
    check_checkpoints,
    fuse_checkpoints,
    global_thresholds,
    open_checkpoint,
    same_tensors,
)
from emorl.fusion.mergekit_file import mergekit_fusion
from emorl.fusion.methods.method import each
from emorl.fusion.operators import OPERATORS, Fusion, check_fusion
from emorl.runs.progress import Progress, Silent
from emorl.runs.run import read_json

_INPUTS_NAME = "fusion_inputs.json"
RECIPE_NAME = "fusion.yaml"
"""in the fused model's folder: the file that makes it again"""


def fuse(file: CheckpointsFile | Mapping[str, Any], progress: Progress | None = None) -> Path:
    """Fuses the checkpoints of a file, ours or mergekit's; returns the folder of the result.

    A folder that was made by the same recipe is left as it is.

    Raises:
        UserError: settings, models or tensors that do not go together, an output folder with something else in it.
    """
    progress = progress or Silent()
    if isinstance(file, CheckpointsFile):
        file = replace(
            file,
            models={name: path.absolute() for name, path in file.models.items()},  # the recipe works from any folder
            base=None if file.base is None else file.base.absolute(),
        )
        recipe, what, method = as_mapping(file), checkpoint_fusion(file), file.method
        trims_globally = method == "ties" and file.settings.get("trim") == "global"
    else:
        recipe, what, method, trims_globally = dict(file), mergekit_fusion(file), file["merge_method"], False
    if "output" not in recipe:
        raise UserError("a file of mergekit names no output: add --output FOLDER")
    output = Path(recipe["output"])
    if _is_made(output, recipe, _inputs(what)):
        progress.say(f"fuse: finished before, in {output}")
        return output
    check_checkpoints(what)
    if trims_globally:
        what = with_global_trim(what)
    progress.say(f"fuse: {method} of {', '.join(model.path.name for model in what.models)}")
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    inputs = json.dumps(_inputs(what), indent=2) + "\n"
    files = {RECIPE_NAME: text, _INPUTS_NAME: inputs, "README.md": _card(what, method, text)}
    return fuse_checkpoints(what, output, files, progress)


def _is_made(output: Path, recipe: Mapping[str, Any], inputs: Mapping[str, list[int]]) -> bool:
    """Whether the output is there, by this recipe from these files.

    Raises:
        UserError: it is there by another recipe, or from other files.
    """
    if not (output / RECIPE_NAME).is_file():
        return False
    old = yaml.safe_load((output / RECIPE_NAME).read_text(encoding="utf-8"))
    changed = [key for key in {**old, **recipe} if key != "output" and old.get(key) != recipe.get(key)]
    remedy = "give another output, or move it away"
    if changed:
        key = changed[0]
        raise UserError(f"{output} was made with other settings ({key}: {old.get(key)!r} -> {recipe.get(key)!r}); {remedy}")
    if read_json(output / _INPUTS_NAME) != inputs:
        raise UserError(f"{output} was made of other weights: a checkpoint has changed since; {remedy}")
    return True


def _inputs(what: CheckpointFusion) -> dict[str, list[int]]:
    """Size and time of change of every file that is read."""
    everyone = [*what.models, *([] if what.base is None else [what.base])]
    files = sorted({entry.file.absolute() for model in everyone for entry in model.entries.values()})
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def checkpoint_fusion(file: CheckpointsFile) -> CheckpointFusion:
    """What our file asks for, checked; nothing is read yet."""
    models = tuple(open_checkpoint(path) for path in file.models.values())
    base = None if file.base is None else open_checkpoint(file.base)
    settings = dict(file.settings)
    trim = settings.pop("trim", "tensor") if file.method == "ties" else "tensor"
    if trim not in ("tensor", "global"):
        raise UserError(f"settings.trim is {trim!r}; expected 'tensor', or 'global' as TIES' authors do")
    whole = Fusion(file.method, tuple(file.weight_of(name) for name in file.models), settings)
    check_fusion(whole, len(models), base is not None)

    def fusion_of(name: str) -> Fusion:
        for part, model in file.keep.items():
            if part in name:
                return Fusion("keep", tuple(float(model == other) for other in file.models))
        return whole

    dtype = None if file.dtype is None else getattr(torch, file.dtype)
    tensors = same_tensors(models, base, fusion_of)
    for part in file.keep:
        if not any(part in tensor.name for tensor in tensors):
            raise UserError(f"keep: no tensor's name contains {part!r}; they are such as {tensors[0].name!r}")
    return CheckpointFusion(models, base, tensors, dtype, file.seed)


def with_global_trim(what: CheckpointFusion) -> CheckpointFusion:
    """The same with TIES' thresholds over the whole model instead of a density per tensor; reads all tensors."""
    assert what.base is not None
    dtypes = {name: entry.dtype for name, entry in what.base.entries.items()}
    trimmed = {
        tensor.name: tensor.fusion
        for tensor in what.tensors
        if tensor.fusion.method == "ties" and dtypes[tensor.name].is_floating_point
    }
    whole = next(iter(trimmed.values()))  # all alike: a file has one fusion beside `keep`
    shares = each(OPERATORS["ties"].complete(whole.settings)["density"], len(what.models))
    thresholds = global_thresholds(what.models, what.base, list(trimmed), shares)
    fusion = replace(whole, settings={**whole.settings, "thresholds": thresholds})
    tensors = (replace(tensor, fusion=fusion) if tensor.name in trimmed else tensor for tensor in what.tensors)
    return replace(what, tensors=tuple(tensors))


def _card(what: CheckpointFusion, method: str, recipe: str) -> str:
    """The model card: what went in, and the recipe that makes it again."""
    everyone = [*([] if what.base is None else [what.base]), *what.models]
    front_matter = {
        "library_name": "transformers",
        "base_model": list(dict.fromkeys(str(model.path) for model in everyone)),
        "tags": ["emorl", "merge", method],
    }
    versions = ", ".join(f"{name} {version(name)}" for name in ("emorl", "torch"))
    return (
        f"---\n{yaml.safe_dump(front_matter, sort_keys=False)}---\n# {method} of {len(what.models)} models\n\n"
        f"Fused by `emorl fuse` ({versions}); the same again: `emorl fuse {RECIPE_NAME} output=FOLDER`.\n\n"
        f"```yaml\n{recipe}```\n"
    )
