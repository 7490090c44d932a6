"""A callable in place of a text: the name that it can be imported again by, and what is written where a text is needed."""

import sys
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import GetPydanticSchema, PlainSerializer, WrapValidator


def callable_name(function: Callable[..., Any]) -> str | None:
    """`module:qualname` where that names this very function or class; None for a lambda, closure, method or instance."""
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str):
        return None
    value = sys.modules.get(module)
    for attribute in qualname.split("."):
        value = getattr(value, attribute, None)
    return f"{module}:{qualname}" if value is function else None


def callable_text(function: str | Callable[..., Any]) -> str:
    """A text itself; the name of a callable, or words in <> that nothing can be imported by."""
    if isinstance(function, str):
        return function
    shown = function if hasattr(function, "__qualname__") else type(function)
    return callable_name(function) or f"<{shown.__module__}:{shown.__qualname__}>"


def _callable_or(value: Any, text: Callable[[Any], str]) -> Any:
    return value if callable(value) else text(value)


TextOrCallable = Annotated[
    str | Callable[..., Any],
    GetPydanticSchema(lambda _, handler: handler(str)),  # a mistake is one in a text: YAML has no callables
    WrapValidator(_callable_or),
    PlainSerializer(callable_text, return_type=str),
]
"""type of a field that takes a text, or in Python a callable; it is written as `callable_text`"""
