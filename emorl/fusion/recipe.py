"""From settings to tensors: what `emorl fuse` does with a file of whole checkpoints, ours or mergekit's."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from emorl.config import UserError, as_mapping
from emorl.fuse_experiment import CheckpointsFile
from emorl.fusion.checkpoints import (
    CheckpointFusion,
    check_checkpoints,
    fuse_checkpoints,
    global_thresholds,
    open_checkpoint,
    same_tensors,
)
from emorl.fusion.mergekit_file import mergekit_fusion
from emorl.fusion.operators import Fusion, check_fusion
from emorl.progress import Progress, Silent

RECIPE_NAME = "fusion.yaml"
"""in the fused model's folder: the file that makes it again"""


def fuse(file: CheckpointsFile | Mapping[str, Any], progress: Progress | None = None) -> Path:
    """Fuses the checkpoints of a file, ours or mergekit's; returns the folder of the result.

    A folder that was made by the same recipe is left as it is.

    Raises:
        UserError: settings, models or tensors that do not go together, an output folder with something else in it.
    """
    progress = progress or Silent()
    ours = isinstance(file, CheckpointsFile)
    recipe = as_mapping(file) if ours else dict(file)
    output = Path(recipe["output"])
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    written = output / RECIPE_NAME
    if written.is_file() and written.read_text(encoding="utf-8") == text:
        progress.say(f"fuse: finished before, in {output}")
        return output
    what = checkpoint_fusion(file) if ours else mergekit_fusion(file)
    method = recipe["method" if ours else "merge_method"]
    progress.say(f"fuse: {method} of {', '.join(str(model.path) for model in what.models)}")
    return fuse_checkpoints(what, output, {RECIPE_NAME: text, "README.md": _card(what, method, text)}, progress)


def checkpoint_fusion(file: CheckpointsFile) -> CheckpointFusion:
    """What our file asks for, checked; tensors are read only for TIES' global trim."""
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
    what = CheckpointFusion(models, base, same_tensors(models, base, fusion_of), dtype, file.seed)
    return with_global_trim(what) if trim == "global" else what


def with_global_trim(what: CheckpointFusion) -> CheckpointFusion:
    """The same with TIES' thresholds over the whole model instead of a density per tensor; reads all tensors."""
    assert what.base is not None
    check_checkpoints(what)
    trimmed = [
        one for one in what.tensors if one.fusion.method == "ties" and what.base.entries[one.name].dtype.is_floating_point
    ]
    density = trimmed[0].fusion.settings.get("density", 0.2)
    shares = [density] * len(what.models) if isinstance(density, float | int) else density
    thresholds = global_thresholds(what.models, what.base, [one.name for one in trimmed], shares)
    fusion = replace(trimmed[0].fusion, settings={**trimmed[0].fusion.settings, "thresholds": thresholds})
    return replace(what, tensors=tuple(replace(one, fusion=fusion) if one in trimmed else one for one in what.tensors))


def _card(what: CheckpointFusion, method: str, recipe: str) -> str:
    """The model card: what went in, and the recipe that makes it again."""
    everyone = [*([] if what.base is None else [what.base]), *what.models]
    front_matter = {
        "library_name": "transformers",
        "base_model": [str(one.path) for one in everyone],
        "tags": ["emorl", "merge", method],
    }
    versions = ", ".join(f"{name} {version(name)}" for name in ("emorl", "torch"))
    return (
        f"---\n{yaml.safe_dump(front_matter, sort_keys=False)}---\n# {method} of {len(what.models)} models\n\n"
        f"Fused by `emorl fuse` ({versions}); the same again: `emorl fuse {RECIPE_NAME} output=FOLDER`.\n\n"
        f"```yaml\n{recipe}```\n"
    )
