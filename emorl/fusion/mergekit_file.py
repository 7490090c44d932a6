"""mergekit's YAML (version 0.1) for linear, slerp, ties, task_arithmetic, dare_linear and dare_ties: models or slices,
parameters with filters and gradients over the layers.

Departures: sums are in float32 whatever `dtype` says, which is the result's; DARE divides by the density, mergekit keeps the L1
norm. What we do not do (tokenizer surgery, modules, `base+adapter`) is refused, never ignored.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from emorl.config import UserError, nearest
from emorl.config.mergekit import MergekitFile
from emorl.config.yaml import parse
from emorl.fusion.checkpoints import Checkpoint, CheckpointFusion, FusedTensor, open_checkpoint
from emorl.fusion.operators import Fusion

logger = logging.getLogger(__name__)

_METHODS = ("linear", "slerp", "ties", "task_arithmetic", "dare_linear", "dare_ties")
_NORMALIZED = {"linear": True, "ties": True}  # mergekit's defaults; False for the others
_ADVICE = {
    "chat_template": "the base's own is kept; change chat_template.jinja beside the result",
    "tokenizer": "the base's own is kept; leave it out",
}
_SAME = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation", "n_head",
         "activation_function")  # fmt: skip
_EMBEDS = re.compile(r"embed|\bwte\b|\bwpe\b|\bshared\b")
_LAYER = re.compile(r"^(?P<stack>.*?\b(?:layers?|h|blocks?)\.)(?P<number>\d+)(?P<rest>\..+)$")

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class _Slice:
    """Some layers of the result: their range in each source, with parameters of each source and of the slice."""

    ranges: Mapping[str, tuple[int, int]]
    by_model: Mapping[str, Parameters]
    parameters: Parameters


def mergekit_fusion(content: Mapping[str, Any]) -> CheckpointFusion:
    """What a mergekit file asks for.

    Raises:
        UserError: a key, method or parameter that is not supported or not known.
    """
    method, known = content["merge_method"], {field.name for field in fields(MergekitFile)}
    if method not in _METHODS:
        raise UserError(f"merge_method {method!r} of mergekit is not supported; {nearest(str(method), _METHODS)}")
    for key in content:
        if key not in known:
            raise UserError(f"mergekit's {key!r} is not supported; {_ADVICE.get(key) or nearest(str(key), known)}")
    file = parse(MergekitFile, content, "mergekit's file")
    sources = file.models or [source for block in file.slices or [] for source in block.sources]
    names, base_name = list(dict.fromkeys(source.model for source in sources)), file.base_model
    if base_name is None and method != "linear":
        raise UserError(f"merge_method {method} needs a base_model")
    everyone = names if base_name is None or base_name in names else [*names, base_name]
    opened = {name: open_checkpoint(name) for name in everyone}
    if file.tokenizer_source not in (None, "base", base_name or names[0]):
        raise UserError("tokenizer_source: only the base model's tokenizer, or the first model's without a base, is supported")
    others = [name for name in names if name != base_name] if method != "linear" else names
    if method == "slerp":
        if len(others) != 1:
            raise UserError(f"slerp is between base_model and one other model, got {others}")
        others = [base_name, *others]
    _check_alike([opened[name] for name in ([base_name] if base_name else []) + [name for name in names if name != base_name]])
    slices = _slices(file, names, opened)
    dtype = file.out_dtype or file.dtype
    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise UserError(f"dtype {dtype!r}: expected float32, float16 or bfloat16")
    reader = _Reader(method, tuple(others), file.parameters)
    leading = opened[base_name or names[0]]
    tensors = tuple(_tensors(leading, slices, reader, base_name))
    depth = sum(stop - start for slice_ in slices for start, stop in [next(iter(slice_.ranges.values()))])
    return CheckpointFusion(
        tuple(opened[name] for name in others),
        opened[base_name] if base_name and method not in ("linear", "slerp") else None,
        tensors,
        None if dtype is None else getattr(torch, dtype),
        config_changes={_depth_key(leading): depth} if file.slices else {},
    )


def _check_alike(models: Sequence[Checkpoint]) -> None:
    """Refuses models whose tensors have one shape and another meaning, and says where they read positions differently."""
    first = models[0]
    for other in models[1:]:
        for key in _SAME:
            mine, theirs = (model.config.get(key) for model in (first, other))
            if None not in (mine, theirs) and mine != theirs:
                raise UserError(f"{first.path} has {key}={mine!r} and {other.path} {theirs!r}; fuse models of one architecture")
        if _vocabulary(first) != _vocabulary(other) and None not in (_vocabulary(first), _vocabulary(other)):
            raise UserError(f"{first.path} and {other.path} number their tokens differently; fuse models of one tokenizer")
        if first.config.get("rope_theta") != other.config.get("rope_theta"):
            logger.warning("%s and %s have another rope_theta: their heads read positions differently", first.path, other.path)
        if _has_head(first) != _has_head(other):
            headed = first if _has_head(first) else other
            raise UserError(
                f"{headed.path} has an output head of its own and the others none; save all with heads "
                "(tie_word_embeddings: false), or all without"
            )


def _has_head(model: Checkpoint) -> bool:
    return "lm_head.weight" in model.entries


def _vocabulary(model: Checkpoint) -> Any:
    """Token -> id of a fast tokenizer; None where none lies beside the model."""
    file = model.path / "tokenizer.json"
    return json.loads(file.read_text(encoding="utf-8")).get("model", {}).get("vocab") if file.is_file() else None


def _slices(file: MergekitFile, names: Sequence[str], opened: Mapping[str, Checkpoint]) -> list[_Slice]:
    if file.models:
        depth = _depth(opened[names[0]])
        by_model = {source.model: source.parameters for source in file.models}
        return [_Slice(dict.fromkeys(opened, (0, depth)), by_model, {})]
    slices = []
    for block in file.slices or []:
        ranges = {source.model: source.layers for source in block.sources}
        if set(ranges) | {file.base_model} != set(opened) | {file.base_model}:
            raise UserError("every slice must have all models as sources (passthrough stacks are mergekit's own)")
        if len({stop - start for start, stop in ranges.values()}) > 1:
            raise UserError(f"the sources of a slice must have as many layers each, got {list(ranges.values())}")
        for name, (_, stop) in ranges.items():
            if stop > _depth(opened[name]):
                raise UserError(f"layer_range ends at {stop}, but {name} has {_depth(opened[name])} layers")
        whole = next(iter(ranges.values()))
        by_model = {source.model: source.parameters for source in block.sources}
        slices.append(_Slice({**dict.fromkeys(opened, whole), **ranges}, by_model, block.parameters))
    return slices


def _layers(checkpoint: Checkpoint) -> dict[str, int]:
    """Stack of layers, such as `model.layers.`, -> how many."""
    depths: dict[str, int] = {}
    for name in checkpoint.entries:
        if matched := _LAYER.match(name):
            depths[matched["stack"]] = max(depths.get(matched["stack"], 0), int(matched["number"]) + 1)
    return depths


def _depth(checkpoint: Checkpoint) -> int:
    depths = _layers(checkpoint)
    if len(depths) != 1:
        raise UserError(
            f"{checkpoint.path} has {len(depths)} stacks of layers {sorted(depths)}; mergekit's files are for models with one, "
            "others fuse by our own file (emorl fuse --help)"
        )
    return next(iter(depths.values()))


def _depth_key(checkpoint: Checkpoint) -> str:
    keys = [key for key in ("num_hidden_layers", "n_layer", "num_layers") if key in checkpoint.config]
    if not keys:
        raise UserError(f"{checkpoint.path}/config.json does not say how many layers there are: slices cannot be built")
    return keys[0]


def _tensors(leading: Checkpoint, slices: Sequence[_Slice], reader: "_Reader", base_name: str | None) -> Iterator[FusedTensor]:
    """The result's tensors in the leading model's order: those before the layers, the layers slice by slice, the rest."""
    layered = {name: matched for name in leading.entries if (matched := _LAYER.match(name))}
    numbered: dict[int, list[re.Match[str]]] = {}
    for matched in layered.values():
        numbered.setdefault(int(matched["number"]), []).append(matched)
    for name in leading.entries:
        if name not in layered:  # what reads the tokens goes with the first slice, what comes behind the layers with the last
            slice_, share = (slices[0], 0.0) if _EMBEDS.search(name) else (slices[-1], 1.0)
            yield FusedTensor(name, reader.fusion(name, slice_, share), (name,) * len(reader.models), name)
    position = 0
    for slice_ in slices:
        start, stop = slice_.ranges[base_name or reader.models[0]]
        for offset in range(stop - start):
            share = offset / (stop - start - 1) if stop - start > 1 else 1.0
            for matched in numbered[start + offset]:

                def named(number: int, matched: re.Match[str] = matched) -> str:
                    return f"{matched['stack']}{number}{matched['rest']}"

                name = named(position)
                sources = tuple(named(slice_.ranges[model][0] + offset) for model in reader.models)
                yield FusedTensor(name, reader.fusion(name, slice_, share), sources, named(start + offset))
            position += 1


@dataclass(frozen=True)
class _Reader:
    """Resolves a tensor's parameters: its source's, then its slice's, then everyone's."""

    method: str
    models: tuple[str, ...]
    parameters: Parameters

    def fusion(self, name: str, slice_: _Slice, share: float) -> Fusion:
        """`share`: how far the tensor's layer lies in its slice, 0 to 1."""

        def common(key: str, default: Any) -> Any:
            return _resolved([slice_.parameters, self.parameters], key, name, share, default)

        def each(key: str, default: Any) -> tuple[float, ...]:
            return tuple(
                _resolved([slice_.by_model.get(model, {}), slice_.parameters, self.parameters], key, name, share, default)
                for model in self.models
            )

        if self.method == "slerp":
            other = each("t", None)[1] if common("t", None) is None else common("t", None)
            if other is None:
                raise UserError("slerp needs the parameter t")
            return Fusion("slerp", (1.0 - other, other))
        weights = each("weight", None)
        if None in weights:
            raise UserError(f"{self.method}: the model {self.models[weights.index(None)]} has no weight for {name}")
        rescale = common("rescale", None)
        if rescale is not None and rescale != self.method.startswith("dare"):
            raise UserError(f"{self.method} with rescale: {str(rescale).lower()} is not supported; leave it out")
        settings: dict[str, Any] = {"normalize": bool(common("normalize", self.method in _NORMALIZED))}
        if self.method != "linear":
            settings["scale"] = float(common("lambda", 1.0))
        if self.method in ("ties", "dare_linear", "dare_ties"):
            settings["density"] = each("density", 1.0)
        if self.method == "dare_linear" and settings.pop("normalize"):
            raise UserError("dare_linear with normalize is not supported; divide the weights by their sum")
        return Fusion(self.method, weights, settings)


def _resolved(blocks: Sequence[Parameters], key: str, name: str, share: float, default: Any) -> Any:
    for block in blocks:
        if key in block and (value := _at(block[key], name, share)) is not None:
            return value
    return default


def _at(setting: Any, name: str, share: float) -> Any:
    """A number; a gradient (list of numbers, interpolated over the layers); or {filter, value} blocks, the first that fits."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if all(isinstance(value, Mapping) for value in setting):
        fitting = [block for block in setting if block.get("filter") in (None, "*") or block["filter"] in name]
        return _at(fitting[0]["value"], name, share) if fitting else None
    scaled = share * (len(setting) - 1)
    below = int(scaled)
    above = min(below + 1, len(setting) - 1)
    return setting[below] + (scaled - below) * (setting[above] - setting[below])
