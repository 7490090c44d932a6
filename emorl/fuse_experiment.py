"""The `fuse` block of an experiment, and the file of `emorl fuse` for whole checkpoints: frozen dataclasses, free of torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from emorl.config import UserError, apply_overrides, nearest, parse, read_yaml

_strict = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, config=_strict, kw_only=True)
class FuseConfig:
    method: str = "linear"
    """linear, task_arithmetic, slerp, ties, dare_linear, dare_ties, model_stock or keep"""
    weights: dict[str, float] = Field(default_factory=dict)
    """of the models, by name; equal weights by default"""
    settings: dict[str, Any] = Field(default_factory=dict)
    """of the method: scale, normalize, density, space (slerp: weights or task_vectors), trim (ties: tensor, or global as its
    authors do)"""


@dataclass(frozen=True, config=_strict, kw_only=True)
class CheckpointsFile(FuseConfig):
    output: Path
    """folder of the fused model; must not exist yet"""
    models: dict[str, Path] = Field(min_length=1)
    """name -> folder of a transformers checkpoint in safetensors; all of one architecture"""
    base: Path | None = None
    """folder of the model they were trained from: methods on differences need it; also gives config and tokenizer"""
    keep: dict[str, str] = Field(default_factory=dict)
    """part of a tensor's name -> model it is taken from as it is, such as {classifier: topics}"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of the result; each tensor's own by default. Sums are in float32 whatever it is"""
    seed: int = 0
    """of DARE's random entries"""

    def __post_init__(self) -> None:
        for what, names in (("weights", self.weights), ("keep", self.keep.values())):
            unknown = sorted(set(names) - set(self.models))
            if unknown:
                raise ValueError(f"{what} names {unknown[0]!r}; {nearest(unknown[0], self.models)}")

    def weight_of(self, name: str) -> float:
        """Weights that are not given are 0; without any, all are equal."""
        return self.weights.get(name, 0.0) if self.weights else 1.0 / len(self.models)


def is_mergekit(content: dict[str, Any]) -> bool:
    """Whether a YAML mapping is mergekit's."""
    return "merge_method" in content


def load_checkpoints_file(path: Path, overrides: Sequence[str] = ()) -> CheckpointsFile | dict[str, Any]:
    """The file of `emorl fuse` with overrides applied; mergekit's as the mapping it is, with `output` added."""
    content = apply_overrides(read_yaml(path), overrides)
    if not is_mergekit(content):
        return parse(CheckpointsFile, content, str(path))
    if not isinstance(content.get("output"), str):
        raise UserError(f"{path} is mergekit's and names no output: add output=FOLDER")
    return content
