"""What a policy says without merit becomes rows of the lowest grade, beside the rows its reward model was trained on."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emorl.config.reward import RewardExperiment
from emorl.objectives.loading import Objective
from emorl.runs.run import write_text
from emorl.training.reward.data import Graded, load_graded

Row = dict[str, Any]
REPEATED, MISMATCHED = "repeated", "mismatched"


def write_tables(reward: RewardExperiment, negatives: Sequence[Row], folder: Path) -> None:
    """The reward model's rows with the negatives, and its validation rows as they were."""
    data = load_graded(reward)
    group_of = {row.prompt: row.group for row in [*data.training, *data.validation]}
    lowest = dict.fromkeys(data.names, reward.data.label_range[0])
    added = [
        {"prompt": row["prompt"], "response": row["response"], **lowest, "group": group_of.get(row["prompt"], row["prompt"])}
        for row in negatives
    ]
    training = [*(_row(reward, data.names, row) for row in data.training), *added]
    write_lines(folder / "validation.jsonl", [_row(reward, data.names, row) for row in data.validation])
    write_lines(folder / "graded.jsonl", training)


def _row(reward: RewardExperiment, names: Sequence[str], row: Graded) -> Row:
    low, high = reward.data.label_range
    labels = {name: low + target * (high - low) for name, target in zip(names, row.targets, strict=True)}
    return {"prompt": row.prompt, "response": row.response, **labels, "group": row.group}


def write_lines(path: Path, rows: Sequence[Row]) -> None:
    """Rows as JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def negatives(answers: Sequence[tuple[str, str]], most: int, seed: int) -> list[Row]:
    """Rows (prompt, response, kind) that deserve the lowest grade, at most `most` of each kind.

    `repeated`: the same words, but for case and spacing, to two prompts or more. `mismatched`: an answer under the prompt of
    somebody whom the policy answered otherwise.
    """
    rng = random.Random(seed)
    times = Counter(_words(text) for _, text in answers)
    repeated = [(prompt, text, REPEATED) for prompt, text in answers if times[_words(text)] > 1]
    mismatched = []
    for prompt, text in answers:
        others = [other for other, answer in answers if other != prompt and _words(answer) != _words(text)]
        if others:
            mismatched.append((rng.choice(others), text, MISMATCHED))
    chosen = [rng.sample(rows, min(most, len(rows))) for rows in (repeated, mismatched)]
    return [{"prompt": prompt, "response": text, "kind": kind} for rows in chosen for prompt, text, kind in rows]


def _words(text: str) -> str:
    return " ".join(text.casefold().split())


def mean_scores(objective: Objective, rows: Sequence[Row]) -> dict[str, float]:
    """Mean score of rows by kind."""
    scores = objective([row["prompt"] for row in rows], [row["response"] for row in rows])
    by_kind: dict[str, list[float]] = {}
    for row, score in zip(rows, scores, strict=True):
        if score is not None:
            by_kind.setdefault(row["kind"], []).append(score)
    return {kind: sum(values) / len(values) for kind, values in by_kind.items()}
