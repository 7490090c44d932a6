"""Responses as a reward model learns from them: targets in [0, 1], parts that are never split, lists to compare.

They come graded, or as pairs: the chosen answer has the target 1, the rejected one 0.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from datasets import Dataset

from emorl.config import UserError, nearest
from emorl.config.reward import RewardExperiment
from emorl.data import read_table
from emorl.policies.conversation import completion_text, prompt_text
from emorl.training.reward.pairs import read_pairs


@dataclass(frozen=True)
class Graded:
    """One response with its targets, in [0, 1] or (classification) one-hot.

    Rows of one `group` are compared with each other, rows of one `part` are all of training or all of validation: a pair is
    a group, and all pairs of a prompt are a part. Graded responses have their group as part.
    """

    prompt: str | None
    response: str
    targets: tuple[float, ...]
    group: str
    part: str = field(repr=False)  # the fingerprint of finished runs is without it


@dataclass(frozen=True)
class GradedData:
    """`names` has one entry for each target."""

    names: list[str]
    training: list[Graded]
    validation: list[Graded]

    def fingerprint(self) -> str:
        """Changes with any row, so that a run over edited tables is another run."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def load_graded(experiment: RewardExperiment) -> GradedData:
    """Reads the tables, checks every row and keeps whole parts for validation.

    Raises:
        UserError: missing files or columns, no responses, labels out of range, too few groups; nothing to rank.
    """
    data = _split(experiment)
    for which, rows in (("training", data.training), ("validation", data.validation)):
        grades: dict[str, set[tuple[float, ...]]] = {}
        for row in rows:
            grades.setdefault(row.group, set()).add(row.targets)
        if experiment.loss == "ranking" and all(len(different) < 2 for different in grades.values()):
            raise UserError(
                f"{experiment.data.path}: no group of its {len(rows)} {which} rows has two different grades, and a ranking "
                "compares inside groups; give more rows, another data.group_column, or loss: regression"
            )
    return data


def _split(experiment: RewardExperiment) -> GradedData:
    data = experiment.data
    tables = [read_table(path) for path in (data.path, data.validation_path) if path]
    names = _names(experiment, tables)
    read = _paired if data.chosen_column is not None else _graded
    rows = [
        read(experiment, table, path, names) for table, path in zip(tables, (data.path, data.validation_path), strict=False)
    ]
    if len(rows) == 2:
        seen = {row.part for row in rows[1]}
        return GradedData(names, _filled([row for row in rows[0] if row.part not in seen], data.path), rows[1])
    parts = sorted({row.part for row in rows[0]})
    if len(parts) < 2:
        raise UserError(f"{data.path}: all rows are of one prompt or data.group_column; validation needs others")
    random.Random(experiment.seed).shuffle(parts)
    kept = set(parts[: min(len(parts) - 1, max(1, round(data.validation * len(parts))))])
    sides = [[row for row in rows[0] if (row.part in kept) == held_out] for held_out in (False, True)]
    return GradedData(names, *sides)


def compared(rows: Sequence[Graded], size: int, seed: int) -> list[list[Graded]]:
    """Lists of up to `size` rows of a group, for a ranking; what has nobody to be compared with stands alone."""
    rng = random.Random(seed)
    members: dict[str, list[Graded]] = {}
    for row in rows:
        members.setdefault(row.group, []).append(row)
    lists = []
    for group in members.values():
        rng.shuffle(group)
        lists += [group[start : start + size] for start in range(0, len(group), size)]
    return lists


def _filled(rows: list[Graded], path: str) -> list[Graded]:
    if not rows:
        raise UserError(f"{path}: every group of it is in the validation file; none is left to train on")
    return rows


def _names(experiment: RewardExperiment, tables: Sequence[Dataset]) -> list[str]:
    """Names of the outputs: the label columns, or the classes."""
    data = experiment.data
    wanted = [data.prompt_column, data.response_column, *data.labels, data.group_column]
    if data.chosen_column is not None:  # without a column of the usual name, the prompt is in the answers
        wanted = [data.prompt_column if data.prompt_column != "prompt" else None, data.chosen_column, data.rejected_column]
    for table, path in zip(tables, (data.path, data.validation_path), strict=False):
        for column in filter(None, wanted):
            if column not in table.column_names:
                raise UserError(f"{path} has no column {column!r}; {nearest(column, table.column_names)}")
    if experiment.loss != "classification":
        return list(data.labels)
    classes = sorted({str(label) for table in tables for label in table[data.labels[0]]})
    if len(classes) < 2:
        raise UserError(f"{data.path}: column {data.labels[0]!r} has one class, {classes[0]!r}; a classifier needs two")
    return classes


def _graded(experiment: RewardExperiment, table: Dataset, path: str | None, names: Sequence[str]) -> list[Graded]:
    data, result = experiment.data, []
    for number, row in enumerate(table, start=1):
        where = f"{path}, row {number}"
        assert isinstance(row, dict)
        response = row[data.response_column]
        if not isinstance(response, (str, list)):
            raise UserError(f"{where}: {data.response_column!r} is {response!r:.40}; expected text or a conversation")
        prompt = None if data.prompt_column is None else row[data.prompt_column]
        if prompt is None and data.prompt_column is not None:
            raise UserError(f"{where}: {data.prompt_column!r} is missing; data.prompt_column=null reads responses alone")
        asked = None if prompt is None else prompt_text(prompt)
        group = row[data.group_column] if data.group_column else asked
        group = str(number if group is None else group)
        targets = _targets(experiment, row, where, names)
        result.append(Graded(asked, completion_text(response), targets, group, group))
    return result


def _paired(experiment: RewardExperiment, table: Dataset, path: str | None, names: Sequence[str]) -> list[Graded]:
    return [
        Graded(pair.prompt, answer, (target,), pair.where, pair.asked)
        for pair in read_pairs(experiment.data, table, str(path))
        for answer, target in ((pair.chosen, 1.0), (pair.rejected, 0.0))
    ]


def _targets(experiment: RewardExperiment, row: dict[str, Any], where: str, names: Sequence[str]) -> tuple[float, ...]:
    data = experiment.data
    if experiment.loss == "classification":
        return tuple(float(str(row[data.labels[0]]) == name) for name in names)
    low, high = data.label_range
    targets = []
    for column in data.labels:
        label = row[column]
        if not isinstance(label, Real) or not low <= float(label) <= high:
            raise UserError(f"{where}: {column!r} is {label!r:.40}; expected a number in data.label_range [{low}, {high}]")
        targets.append((float(label) - low) / (high - low))
    return tuple(targets)
