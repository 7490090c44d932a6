"""Prompt data sets in TRL's column format: a hub id or a local csv, json, jsonl or parquet file; disjoint splits."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from emorl.config import UserError, nearest
from emorl.config.experiment import DataConfig
from emorl.config.places import TABLES, check_table_file
from emorl.policies.conversation import as_prompt

logger = logging.getLogger(__name__)

_TAKEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "image", "images")
"""what reward functions get beside the data's columns, and what would make a prompt more than text"""


@dataclass(frozen=True)
class Splits:
    """Three data sets with no prompt in common; column `prompt` plus the data set's own columns."""

    train: Dataset
    validation: Dataset
    test: Dataset


def load_prompts(config: DataConfig, seed: int, conversational: bool) -> Splits:
    """Reads, removes repeated prompts, shuffles by the config's seed, or by `seed` where it has none, and splits.

    Args:
        conversational: turn text prompts into one user turn (plus the system turn), as TRL's conversational format.

    Raises:
        UserError: missing or empty data, a missing column, prompts that are no prompts, too few of them.
    """
    seen: set[str] = set()
    parts = {
        name: _unique(read_table(path, config.split), config, _named(path), seen)
        for name, path in (("test", config.test_path), ("validation", config.validation_path), ("train", config.path))
        if path
    }
    rest = parts["train"].shuffle(seed=seed if config.seed is None else config.seed)
    for name, size in (("test", config.test), ("validation", config.validation)):
        if name in parts:
            parts[name] = parts[name].select(range(min(size, len(parts[name]))))
            continue
        if len(rest) <= size:
            raise UserError(
                f"{_named(config.path)}: {len(parts['train'])} distinct prompts are too few to keep data.{name}={size} of them "
                "apart; lower it or bring more prompts"
            )
        parts[name], rest = rest.select(range(size)), rest.select(range(size, len(rest)))
    if len(rest) == 0:
        raise UserError(f"{_named(config.path)}: every prompt is in the validation or test file too; none is left to train on")
    parts["train"] = rest
    return Splits(**{name: _render_column(part, config, conversational) for name, part in parts.items()})


def _named(path: Any) -> str:
    return path if isinstance(path, str) else "the data set"


def read_table(path: Any, split: str = "train") -> Dataset:
    """The rows of a csv, json, jsonl or parquet file, or of a split of a hub data set; a `Dataset` is its own.

    Raises:
        UserError: no such file or data set, an empty or unreadable one.
    """
    if isinstance(path, Dataset):
        return path
    if not isinstance(path, str):
        raise UserError(f"data.path: expected a file, a hub id or a datasets.Dataset, got {path!r:.60}")
    check_table_file(path)
    reader = TABLES.get(Path(path).suffix)
    try:
        if reader is not None:
            return load_dataset(reader, data_files=path, split="train")
        return load_dataset(path, split=split)
    except DatasetNotFoundError as error:
        raise UserError(f"data set {path!r} is neither a file here nor found on the hub: {error}") from None
    except ConnectionError as error:
        raise UserError(f"data set {path!r}: the hub cannot be reached ({error}); give a local file") from None
    except (ValueError, TypeError, DatasetGenerationError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{path} cannot be read as a table: {reason:.200}") from None


def _unique(rows: Dataset, config: DataConfig, path: str, seen: set[str]) -> Dataset:
    """The rows whose prompt is new; `seen` grows, so that no two splits share a prompt."""
    column = config.prompt_column
    if len(rows) == 0:
        raise UserError(f"{path} is empty; it needs at least one prompt")
    if column not in rows.column_names:
        raise UserError(f"{path} has no column {column!r} (data.prompt_column); {nearest(column, rows.column_names)}")
    for name in rows.column_names:
        if name in _TAKEN and name != column:
            raise UserError(f"{path} has a column {name!r}, which is what TRL hands to reward functions itself; rename it")
    columns = _columns(rows, path)
    prompts = [
        _read_prompt(prompt, f"{path}, row {index}, column {column!r}") for index, prompt in enumerate(columns[column], 1)
    ]
    if len({type(prompt) for prompt in prompts}) > 1:
        raise UserError(f"{path}, column {column!r} holds texts and conversations; give one of both")
    keep = []
    for index, prompt in enumerate(prompts):
        text = repr(prompt)
        if text not in seen:
            seen.add(text)
            keep.append(index)
    if len(keep) < len(rows):
        logger.info("%s: %d of %d prompts are repeated and were left out", path, len(rows) - len(keep), len(rows))
    return Dataset.from_dict({**columns, column: prompts}).select(keep)


def _columns(rows: Dataset, path: str) -> dict[str, list[Any]]:
    """All values by column; a text that is none shows only when it is read."""
    try:
        return {name: list(rows[name]) for name in rows.column_names}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a table: {error!s:.200}; expected UTF-8") from None


def _read_prompt(prompt: Any, where: str) -> Any:
    """A text as it is, a conversation with a role and a text in each turn; parts of a typed content become one text."""
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(isinstance(turn, Mapping) for turn in prompt):
        return [_read_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(prompt, 1)]
    raise UserError(f"{where}: expected a text or a list of role/content turns, got {prompt!r:.60}")


def _read_turn(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or not role:
        raise UserError(f"{where}: expected a role such as user, got {role!r:.60} in {dict(turn)!r:.80}")
    if isinstance(content, list) and content and all(isinstance(part, Mapping) for part in content):
        kinds = {part.get("type"): None for part in content if part.get("type") != "text"}
        if kinds:
            raise UserError(f"{where}: content of type {next(iter(kinds))!r}; only text can be read")
        content = "".join(str(part.get("text") or "") for part in content)
    if not isinstance(content, str):
        raise UserError(f"{where}: expected a text as content, got {content!r:.60}")
    rest = {key: value for key, value in turn.items() if key not in ("role", "content") and value is not None}
    return {"role": role, "content": content, **rest}


def _render_column(rows: Dataset, config: DataConfig, conversational: bool) -> Dataset:
    """`prompt` in TRL's format; the other columns untouched."""

    if not conversational and config.system_prompt:
        raise UserError("data.system_prompt needs a base with a chat template; this one has none")
    columns = {name: rows[name] for name in rows.column_names if name not in ("prompt", config.prompt_column)}
    prompts = [
        as_prompt(prompt, conversational, config.system_prompt) if isinstance(prompt, str) else prompt
        for prompt in rows[config.prompt_column]
    ]
    return Dataset.from_dict({"prompt": prompts, **columns})
