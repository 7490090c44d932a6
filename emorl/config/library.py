"""Blocks that go straight to another library: its dataclass is made of them, and every mistake in one is one line."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from emorl.config import UserError, nearest

Settings = TypeVar("Settings")

REFUSALS = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError, re.error)
"""what libraries raise where a setting is of no use to them"""


def library_settings(
    kind: type[Settings],
    block: Mapping[str, Any],
    where: str,
    owner: str,
    defaults: Mapping[str, Any] | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> Settings:
    """A library's dataclass from a user's block; numbers are read as the fields declare them.

    Args:
        where: the block's place in the file, such as `train.grpo`.
        owner: the dataclass as its users know it, such as `trl.GRPOConfig`.
        defaults: for what the block leaves out.
        fixed: what the block cannot change.

    Raises:
        UserError: an unknown key, a value of another type, a number that is none, or what the library refuses.
    """
    kinds = typing.get_type_hints(kind)
    check_keys(block, [field.name for field in dataclasses.fields(kind)], where, owner)  # type: ignore[arg-type]
    read = {key: _read(value, kinds[key], f"{where}.{key}") for key, value in block.items()}
    try:
        return kind(**{**(defaults or {}), **read, **(fixed or {})})
    except REFUSALS as error:
        raise refused(where, error) from None


def refused(where: str, error: BaseException) -> UserError:
    """What a library said of a block, as one line."""
    reason = " ".join(str(error).split())
    return UserError(f"{where}: {reason:.300}" if reason else f"{where}: refused ({type(error).__name__})")


def check_keys(block: Mapping[str, Any], known: Iterable[str], where: str, owner: str) -> None:
    """Refuses keys of a block that goes straight to another library's `owner` when it does not know them."""
    for key in block:
        if key not in (known := set(known)):
            raise UserError(f"unknown key '{where}.{key}' (it goes to {owner}); {nearest(key, known)}")


def _read(value: Any, kind: Any, where: str) -> Any:
    """The value as its field declares it; true and false pass where a text may stand, as libraries take them there too, and one
    text stands for a list of it."""
    expected = f"{where}: expected {_shown(kind)}, got {value!r:.80}"
    if isinstance(value, bool):
        if bool in (inside := {kind, *_inside(kind)}) or str in inside or Any in inside:
            return value
        raise UserError(expected)
    if kind == list[str] and isinstance(value, str):
        return [value]
    try:
        read = TypeAdapter(kind, config=_config_of(kind)).validate_python(value)
    except ValidationError:
        if isinstance(value, str) and any(value.startswith(family) for family in _families(kind)):
            return value
        raise UserError(expected) from None
    if isinstance(read, float) and not math.isfinite(read):
        raise UserError(f"{where}: expected a finite number, got {read}")
    return read


def _config_of(kind: Any) -> ConfigDict | None:
    """pydantic takes none beside the config of a dataclass."""
    return None if dataclasses.is_dataclass(kind) else ConfigDict(arbitrary_types_allowed=True)


def _families(kind: Any) -> list[str]:
    """What texts may begin with: PEFT writes `pissa_niter_[number of iters]` for all that begin alike."""
    return [part.partition("[")[0] for part in _inside(kind) if isinstance(part, str) and part.endswith("]")]


def _inside(kind: Any) -> list[Any]:
    return [part for inner in typing.get_args(kind) for part in (inner, *_inside(inner))]


_READ_AS = {
    float: "a number",
    int: "a whole number",
    str: "a text",
    bool: "true or false",
    dict: "a block",
    list: "a list",
    type(None): "nothing",
}


def _shown(kind: Any) -> str:
    """A type as a user reads it: `a number or nothing`."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " or ".join(map(repr, inside))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_shown, inside))
    return _READ_AS.get(origin or kind) or getattr(kind, "__name__", str(kind))
