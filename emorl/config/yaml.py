"""YAML and command-line overrides become frozen dataclasses; unknown keys are refused with the nearest valid name.

Kept free of torch, so that a mistake in an experiment file is reported within a second.
"""

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from emorl.config import UserError, nearest
from emorl.config.objects import shown_name

Config = TypeVar("Config")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as a string; this reads it as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


BASED_ON = "based_on"


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; every way it can be wrong is a `UserError` naming the file.

    A key `based_on: other.yaml` (beside the file) begins with what stands there: blocks are merged key by key, everything
    else is replaced.
    """
    return _read_based(path, ())


def _read_based(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    content = _read_mapping(path)
    if BASED_ON not in content:
        return content
    other, above = content.pop(BASED_ON), (*above, path.resolve())
    if not isinstance(other, str) or (path.parent / other).resolve() in above:
        raise UserError(f"{path}: {BASED_ON} names another YAML file beside this one, got {other!r:.80}")
    return _merged(_read_based(path.parent / other, above), content)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if both else value
    return result


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of the command's YAML file (--help lists its keys)")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split()):.300}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of blocks such as `base:` and `objectives:`, got {content!r:.60}")
    return content


def apply_overrides(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `content` with every `dotted.key=value` (value in YAML) set.

    >>> apply_overrides({"search": {"levels": 5}}, ["search.levels=3"])
    {'search': {'levels': 3}}
    """
    result: dict[str, Any] = dict(content)
    for override in overrides:
        dotted, separator, text = override.partition("=")
        if not separator or not dotted:
            raise UserError(f"override {override!r}: expected dotted.key=value, for example search.levels=3")
        try:
            value = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, RecursionError):
            raise UserError(f"override {override!r}: {text!r} is not a YAML value; quote it") from None
        *parents, last = dotted.split(".")
        block = result
        for parent in parents:
            child = block.get(parent)
            if child is not None and not isinstance(child, Mapping):
                raise UserError(f"override {override!r}: {parent!r} is {child!r}, not a block with keys of its own")
            block[parent] = dict(child or {})
            block = block[parent]
        block[last] = value
    return result


def parse(config_class: type[Config], content: Mapping[str, Any], source: str) -> Config:
    """`content` as a validated `config_class`; the first mistake is raised as one `UserError` line.

    `source` names where the content came from (a file), for the message.
    """
    try:
        return TypeAdapter(config_class).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = [str(part) for part in first["loc"]]
        raise UserError(f"{source}: {_explain(config_class, where, first)}") from None


def _explain(config_class: type, where: Sequence[str], error: Mapping[str, Any]) -> str:
    """One line of advice for one of pydantic's errors."""
    dotted = ".".join(where)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key {dotted!r}; {nearest(where[-1], _keys_of(config_class, where[:-1]))}"
    if error["type"] in ("missing", "missing_argument"):
        return f"key {dotted!r} is missing and has no default"
    given, context = error["input"], error.get("ctx", {})
    if error["type"] in _EXPECTED:
        expected, found = _EXPECTED[error["type"]].format(**context), "nothing" if given is None else f"{given!r:.80}"
        return f"{dotted or 'the whole'}: expected {expected}, got {found}{_remedy(dotted, given)}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{dotted}: {message} (got {given!r:.80})" if dotted else message


_EXPECTED = {
    "string_type": "a text",
    "path_type": "a path",
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list, such as [1, 2]"),
    **dict.fromkeys(("dict_type", "mapping_type", "dataclass_type"), "a block with keys of its own, such as {{key: value}}"),
    "literal_error": "{expected}",
    "finite_number": "a finite number",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "too_short": "at least {min_length} of them",
}
"""pydantic's kinds of errors -> what a value should have been"""


def _remedy(dotted: str, given: Any) -> str:
    if given is not None:
        return ""
    name, colon, value = dotted.rpartition(".")[2].partition(":")
    if colon:
        return f"; YAML needs a blank behind the colon: {{{name}: {value}}}"
    return "; give it a value"


def _keys_of(config_class: type, path: Sequence[str]) -> list[str]:
    """The field names of the dataclass that `path` leads to."""
    current: Any = config_class
    for part in path:
        fields = {field.name: field.type for field in dataclasses.fields(current)} if _is_block(current) else {}
        current = next((kind for kind in _kinds(fields.get(part, current)) if _is_block(kind)), current)
    return [field.name for field in dataclasses.fields(current)] if _is_block(current) else []


def _is_block(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _kinds(annotation: Any) -> list[Any]:
    """The annotation and everything inside its brackets: `dict[str, X]` gives X too."""
    return [annotation, *(kind for inner in getattr(annotation, "__args__", ()) for kind in _kinds(inner))]


def as_mapping(config: Any, name_object: Callable[[Any], str] = shown_name) -> dict[str, Any]:
    """A dataclass as plain YAML-able values (paths as text); `name_object` gives the text of an object that stands in place of
    a path."""
    return TypeAdapter(type(config)).dump_python(config, mode="json", fallback=name_object)


def to_yaml(config: Any, name_object: Callable[[Any], str] = shown_name) -> str:
    return yaml.safe_dump(as_mapping(config, name_object), sort_keys=False, allow_unicode=True)


def describe(config_class: type, prefix: str = "", only: Collection[str] = ()) -> str:
    """The keys of a config block with defaults and meanings, for `--help`: a paragraph for each block of the whole, or for
    `only` some of them."""
    lines = []
    documents = TypeAdapter(config_class).json_schema()
    properties = documents.get("properties", {})
    for field in dataclasses.fields(config_class):
        if only and field.name not in only:
            continue
        name, meaning = f"{prefix}{field.name}", properties.get(field.name, {}).get("description", "")
        block = next((kind for kind in _kinds(field.type) if _is_block(kind)), None)
        if block is not None and not prefix:
            lines.append("")
        lines.append(f"  {name}{_shown_default(field, properties.get(field.name, {}))}  {' '.join(meaning.split())}".rstrip())
        if block is not None:
            inner = f"{name}.NAME." if typing.get_origin(field.type) is dict else f"{name}."
            lines += [describe(block, inner), *([] if prefix else [""])]
    return re.sub("\n\n+", "\n\n", "\n".join(lines))


def _shown_default(field: dataclasses.Field[Any], schema: Mapping[str, Any]) -> str:
    if "default" in schema:
        return f" [{schema['default']}]"
    made = field.default.get_default(call_default_factory=True) if isinstance(field.default, FieldInfo) else None
    if not isinstance(made, list | dict) or not made:
        return ""
    text = yaml.safe_dump(made, default_flow_style=True, sort_keys=False, width=math.inf).strip()
    return f" {text}" if isinstance(made, list) else f" [{text}]"
