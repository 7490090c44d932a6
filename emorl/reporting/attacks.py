"""The comparison's attacks on the objectives (evaluation/hacking.py), run on the test prompts and kept in `hacking.json`."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset

from emorl.config import UserError, nearest
from emorl.config.experiment import Experiment
from emorl.data import Splits, load_prompts
from emorl.evaluation.hacking import References, Score, check_objective, sameness
from emorl.evaluation.scoring import score
from emorl.objectives.loading import Objective, load_objective
from emorl.policies.base import load_tokenizer
from emorl.policies.prompts import is_chat
from emorl.reporting.results import BASE, without_nan
from emorl.runs.progress import Progress
from emorl.runs.run import Cost, Run, read_json, write_json

_AT_ONCE = 256


def load_splits(experiment: Experiment) -> Splits:
    """The experiment's prompts.

    Raises:
        UserError: the data is not there or lacks the references' column.
    """
    splits = load_prompts(experiment.data, experiment.seed, is_chat(load_tokenizer(experiment.base.model)))
    column = experiment.evaluate.references
    for part in (splits.train, splits.test):
        if experiment.evaluate.attacks and column is not None and column not in part.column_names:
            raise UserError(f"evaluate.references: the data has no column {column!r}; {nearest(column, part.column_names)}")
    return splits


def attacks_missing(experiment: Experiment, path: Path) -> bool:
    """Whether attacks are wanted that were not made, or against other references."""
    wanted = experiment.evaluate.attacks
    return wanted and {check["objective"] for check in _known_attacks(experiment, path)} != set(experiment.objectives)


def _known_attacks(experiment: Experiment, path: Path) -> list[dict[str, Any]]:
    """The objectives that were attacked before, against the same references."""
    found = read_json(path / "hacking.json") if (path / "hacking.json").exists() else {"references": None, "objectives": []}
    return found["objectives"] if found["references"] == experiment.evaluate.references else []


def attack(experiment: Experiment, run: Run, progress: Progress) -> Run:
    """Writes `hacking.json`: how alike each system's answers are, and each objective under attack; those attacked before an
    interruption are kept."""
    splits = load_splits(experiment)
    references = _references(splits, experiment.evaluate.references)
    completions = pd.read_parquet(run.path / "completions.parquet")
    first = completions[completions["sample"] == completions["sample"].min()]
    answers = first.groupby("system", sort=False)["completion"]
    systems = {str(name): asdict(sameness(texts.tolist())) for name, texts in answers}
    checks = _known_attacks(experiment, run.path)
    known = {check["objective"] for check in checks}
    missing = {name: config for name, config in experiment.objectives.items() if name not in known}
    with progress.bar("attack", len(experiment.objectives), done=len(checks)) as bar:
        for name, config in missing.items():
            start = time.perf_counter()
            scores = scores_of_rows(load_objective(name, config), splits.test)
            check = check_objective(name, scores, completions, references, BASE, experiment.seed)
            checks = [*checks, asdict(check)]
            content = {"references": experiment.evaluate.references, "objectives": checks, "systems": systems}
            write_json(run.path / "hacking.json", without_nan(content))
            run = run.add_cost(Cost(reward_calls=check.scored, seconds=time.perf_counter() - start))
            bar.advance(1, name)
    return run


def _references(splits: Splits, column: str | None) -> References:
    if column is None:
        return References()
    of_prompts = {row: _texts(value, column) for row, value in enumerate(splits.test[column])}
    return References(of_prompts, [text for value in splits.train[column] for text in _texts(value, column)])


def _texts(value: Any, column: str) -> list[str]:
    """One cell of the references' column: nothing, a text or a list of texts."""
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"evaluate.references: column {column!r} holds {value!r:.60}; expected a text or a list of texts")
    return texts


def scores_of_rows(objective: Objective, data: Dataset) -> Score:
    """The objective for responses to rows of the test data, in batches that an objective without its own can hold."""

    def scores(rows: Sequence[int], texts: Sequence[str]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(rows), _AT_ONCE):
            here = slice(start, start + _AT_ONCE)
            part = pd.DataFrame({"prompt_index": rows[here], "completion": texts[here]})
            try:
                found += score(part, data, [objective])[objective.name].tolist()
            except UserError:
                raise
            except Exception as error:  # whatever a reward function of the user's raises on a text it did not expect
                raise UserError(
                    f"objective {objective.name!r} cannot score the texts it is attacked with ({type(error).__name__}: "
                    f"{error!s:.100}); a policy may write such texts too. Repair it, or set evaluate.attacks=false"
                ) from error
        return found

    return scores
