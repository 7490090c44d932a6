"""An object of the caller's where a file has a text: a loaded model, a data set, a function."""

import sys
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import GetPydanticSchema, PlainSerializer, WrapValidator
from pydantic_core import ArgsKwargs

_YAML = (str, bool, int, float, list, dict, type(None))


def is_object(value: Any) -> bool:
    """Whether a value cannot have come from a file."""
    return not isinstance(value, _YAML)


def short_form(key: str, value: Any) -> Any:
    """A block from a text or an object alone, which are what its `key` says; what is a block already stays."""
    is_alone = isinstance(value, str) or (is_object(value) and not isinstance(value, ArgsKwargs))
    return {key: value} if is_alone else value


def callable_name(function: Callable[..., Any]) -> str | None:
    """`module:qualname` where that names this very function or class; None for a lambda, closure, method or instance."""
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str):
        return None
    value = sys.modules.get(module)
    for attribute in qualname.split("."):
        value = getattr(value, attribute, None)
    return f"{module}:{qualname}" if value is function else None


def shown_name(value: Any) -> str:
    """A text itself; what a callable can be imported by; else words in <> that nothing can be imported by."""
    if isinstance(value, str):
        return value
    named = value if hasattr(value, "__qualname__") else type(value)
    return callable_name(value) or f"<{named.__module__}:{named.__qualname__}>"


def _object_or(value: Any, text: Callable[[Any], str]) -> Any:
    return value if is_object(value) else text(value)


def _written(value: Any) -> Any:
    return value if isinstance(value, str) else callable_name(value) or value


TextOrObject = Annotated[
    Any,
    GetPydanticSchema(lambda _, handler: handler(str)),  # a mistake is one in a text: a file has no objects
    WrapValidator(_object_or),
    PlainSerializer(_written),
]
"""type of a field that takes a text, or in Python an object; `config.yaml.as_mapping` says what is written in its place"""
