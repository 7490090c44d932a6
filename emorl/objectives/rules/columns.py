"""The data's columns that rules compare completions with."""

from collections.abc import Mapping, Sequence
from typing import Any

from emorl.config import UserError, nearest


def column(columns: Mapping[str, Any], name: str, objective: str, option: str) -> Sequence[Any]:
    """The values of a column, one per completion.

    Raises:
        UserError: the data has no such column; names the objective's option that asked for it and the nearest columns.
    """
    if name not in columns:
        raise UserError(
            f"{objective} needs the data's column {name!r} (`{option}`), which is not there; {nearest(name, columns)}"
        )
    return columns[name]


def texts(value: Any, objective: str, name: str, row: int) -> list[str]:
    """The texts that one row holds: one, or a list, none empty.

    Raises:
        UserError: anything else; an empty reference or test would pay silence.
    """
    held = list(value) if isinstance(value, list | tuple) else [value]
    if not held or not all(isinstance(text, str) and text.strip() for text in held):
        raise UserError(
            f"{objective}: completion {row} has {value!r:.60} in column {name!r}; expected a text, or a list of texts, "
            "none of them empty"
        )
    return held
