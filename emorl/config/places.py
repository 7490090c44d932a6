"""What a file names must be there: looked at before any library is imported."""

from pathlib import Path
from typing import Any

from emorl.config import UserError
from emorl.config.experiment import Experiment

TABLES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""a table file's ending -> the reader of `datasets`"""


def check_places(experiment: Experiment) -> None:
    """Refuses prompts, pairs and a base that are on no disk and, by their names, on no hub either.

    Raises:
        UserError: one of them, by its key.
    """
    data = experiment.data
    pairs = [objective.pairs for objective in experiment.objectives.values() if objective.pairs is not None]
    of_pairs = [path for one in pairs for path in (one.path, one.validation_path)]
    for path in (data.path, data.validation_path, data.test_path, *of_pairs):
        if isinstance(path, str):
            check_table_file(path)
    model = experiment.base.model
    if isinstance(model, str) and _is_local(model) and not Path(model).expanduser().exists():
        raise UserError(f"base.model {model!r}: no such folder; expected one with a language model, or a hub id")


def _is_local(name: str) -> bool:
    """Whether a name is a path and no hub id, which is `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def check_table_file(path: Any) -> None:
    """Refuses a file of rows that is missing, empty or of another kind; a hub id passes."""
    file = Path(path)
    if file.suffix not in TABLES and file.exists():
        raise UserError(f"{path}: expected a file ending in {', '.join(TABLES)}, or the hub id of a data set")
    if file.suffix in TABLES and not file.is_file():
        raise UserError(f"{path}: no such file; expected a csv, json, jsonl or parquet file or a hub id")
    if file.suffix in TABLES and file.stat().st_size == 0:
        raise UserError(f"{path} is empty; it needs at least one row")
