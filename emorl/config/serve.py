"""The block `serve` of an experiment: what `emorl serve` takes on at once."""

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_strict = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True, config=_strict)
class ServeConfig:
    rows: int = Field(default=32, ge=1)
    """texts that are written side by side, at most"""
    queue: int = Field(default=128, ge=1)
    """requests that wait for a place, at most; further ones are told to come back later (429)"""
    memory: float | None = Field(default=None, gt=0)
    """GiB for keys and values, a quarter of it for prompts that may come again; by default a third of what is free at the
    start"""
    longest_prompt: int | None = Field(default=None, ge=1)
    """tokens of a prompt, at most; by default what the base has positions for"""
    chunk: int = Field(default=256, ge=1)
    """tokens of a new prompt that are read between two steps of the texts being written"""
    seconds: float = Field(default=600.0, gt=0)
    """for one request, at most; what is written until then is its answer"""
