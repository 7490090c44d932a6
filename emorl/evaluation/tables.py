"""Reads the tables of a run directory: whole, or one line that says how to make them again."""

from collections.abc import Collection
from pathlib import Path

import pandas as pd

from emorl.config import UserError


def read_table(file: Path, columns: Collection[str], remedy: str, rows: int | None = None) -> pd.DataFrame:
    """A csv or parquet file of ours.

    Args:
        columns: that it must have; a last column `front` must be whole.
        remedy: what writes it again.
        rows: how many it must have, where that is known.

    Raises:
        UserError: it is missing, damaged or cut.
    """
    try:
        table = pd.read_csv(file) if file.suffix == ".csv" else pd.read_parquet(file)
    except FileNotFoundError:
        raise UserError(f"{file} is missing; {remedy}") from None
    except (ValueError, OSError) as error:  # pandas' and Arrow's own among them
        raise UserError(f"{file} is damaged ({' '.join(str(error).split()):.120}); {remedy}") from None
    lost = [name for name in columns if name not in table]
    if lost:
        raise UserError(f"{file} is damaged (no column {lost[0]!r}); {remedy}")
    if rows is not None and len(table) != rows:
        raise UserError(f"{file} is damaged ({len(table)} rows instead of {rows}); {remedy}")
    if "front" in table and table["front"].dtype != bool:
        raise UserError(f"{file} is damaged (its last line is cut); {remedy}")
    return table
