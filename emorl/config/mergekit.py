"""The shape of a mergekit file (version 0.1): what stands where, and which values there can be."""

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from emorl.config import UserError, nearest

_strict = ConfigDict(extra="forbid", allow_inf_nan=False)

SWITCHES = ("normalize", "rescale", "int8_mask")
NUMBERS = ("weight", "density", "t", "lambda")


def _checked(parameters: Any) -> Any:
    """Each a number (a switch: true or false), a gradient of them, or blocks {filter, value} of these."""
    for name, value in (parameters or {}).items() if isinstance(parameters, dict) else ():
        if name not in (*SWITCHES, *NUMBERS):
            raise UserError(f"mergekit's parameter {name!r} is not supported; {nearest(str(name), (*SWITCHES, *NUMBERS))}")
        if not _fits(value, name in SWITCHES, may_filter=True):
            kind = "true or false" if name in SWITCHES else "a number, or a list of them"
            raise UserError(f"mergekit's {name}: expected {kind}, or a list of {{filter, value}}, got {value!r:.60}")
    return parameters or {}


def _fits(value: Any, is_switch: bool, may_filter: bool) -> bool:
    if isinstance(value, dict) and may_filter:
        return set(value) <= {"filter", "value"} and "value" in value and _fits(value["value"], is_switch, False)
    if isinstance(value, list):
        return bool(value) and all(_fits(one, is_switch, may_filter) and not isinstance(one, list) for one in value)
    if value is None or isinstance(value, bool):
        return value is None or is_switch
    return not is_switch and isinstance(value, int | float) and abs(value) < 1e30


Parameters = Annotated[dict[str, Any], BeforeValidator(_checked)]


@dataclass(frozen=True, config=_strict)
class Source:
    """A model, in a slice with the layers that are taken from it."""

    model: str
    layer_range: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)] | None = None
    parameters: Parameters = Field(default_factory=dict)

    @property
    def layers(self) -> tuple[int, int]:
        start, stop = self.layer_range or (0, 0)
        return start, stop


@dataclass(frozen=True, config=_strict)
class Block:
    """Some layers of the result."""

    sources: Annotated[list[Source], Field(min_length=1)]
    parameters: Parameters = Field(default_factory=dict)

    def __post_init__(self) -> None:
        for source in self.sources:
            if source.layer_range is None or source.layer_range[0] > source.layer_range[1]:
                raise ValueError(f"layer_range of {source.model}: expected [first, behind the last], got {source.layer_range}")


@dataclass(frozen=True, config=_strict)
class MergekitFile:
    merge_method: str
    models: Annotated[list[Source], Field(min_length=1)] | None = None
    slices: Annotated[list[Block], Field(min_length=1)] | None = None
    base_model: str | None = None
    parameters: Parameters = Field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    output: Any = None

    def __post_init__(self) -> None:
        if (self.models is None) == (self.slices is None):
            raise ValueError("a mergekit file has either models or slices")
        for sources in [self.models] if self.models else [block.sources for block in self.slices or []]:
            names = [source.model for source in sources]
            for name in names:
                if "+" in name:
                    raise ValueError(
                        f"model {name!r}: expected the folder of a checkpoint; fuse an adapter into its base first"
                    )
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"model {twice!r} is listed twice; list it once, with the sum of its weights")
