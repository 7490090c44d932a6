"""Adversarial refresh: a policy finds what its reward model pays without merit, and the reward model learns to refuse it
(`emorl refresh-reward refresh.yaml`).

A round: train a policy on the reward model by GRPO; take what the policy says, word for word, to several prompts, and its
answers under other people's prompts; add both as rows of the lowest grade; go on training the reward model with them.
Every step is a run of its own below OUTPUT/round-N, so that a killed refresh continues where it was. Before and after are
compared on the added rows, on rows made alike from what the policy says to the experiment's validation prompts, which are
never trained on, and on the reward model's validation rows, which never change.
"""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from emorl.config.experiment import Experiment
from emorl.config.reward import RefreshExperiment, RewardExperiment
from emorl.config.yaml import as_mapping
from emorl.data import load_prompts
from emorl.evaluation.scoring import generate
from emorl.objectives.loading import load_objective
from emorl.policies.base import load_base
from emorl.policies.prompts import is_chat
from emorl.runs.layout import policy_directories
from emorl.runs.progress import Progress, Silent
from emorl.runs.run import only_process, open_run, read_json, write_json, write_text
from emorl.training.policy import train
from emorl.training.reward.data import Graded, load_graded
from emorl.training.reward.model import MODEL_DIRECTORY, read_figures, train_reward

Row = dict[str, Any]
REPEATED, MISMATCHED = "repeated", "mismatched"


def refresh(experiment: RefreshExperiment, progress: Progress | None = None) -> Path:
    """Runs all rounds; returns the directory with `result.json`: per round the policy's training, what was added, mean
    scores of the added and of the held-out rows before and after, and the validation figures before and after.

    Raises:
        UserError: as `train_reward` and `train`.
    """
    progress = progress or Silent()
    output = experiment.policy.output
    with only_process(output):
        run = open_run(output, "refresh", as_mapping(experiment))
        if run.finished:
            progress.say(f"refresh: finished before, in {output}")
            return output
        reward, rounds = experiment.reward, []
        train_reward(reward, progress)
        for number in range(1, experiment.rounds + 1):
            rounds.append(_round(experiment, reward, output / f"round-{number}", progress))
            reward = _refreshed(experiment, reward, output / f"round-{number}")
        write_json(output / "result.json", {"model": str(reward.output / MODEL_DIRECTORY), "rounds": rounds})
        run.finish()
    return output


def read_rounds(output: Path) -> list[dict[str, Any]]:
    """What each round of a finished refresh found and changed."""
    return read_json(output / "result.json")["rounds"]


def _round(experiment: RefreshExperiment, reward: RewardExperiment, folder: Path, progress: Progress) -> dict[str, Any]:
    [name] = experiment.policy.objectives
    policy = _policy(experiment.policy, reward, folder)
    train(policy, name, progress)
    found = {part: folder / f"{part}.jsonl" for part in ("negatives", "held_out")}
    if not all(path.exists() for path in found.values()):
        _find(experiment, policy, found)
    added, held_out = ([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in found.values())
    after = _refreshed(experiment, reward, folder)
    if not (folder / "graded.jsonl").exists():
        _write_tables(reward, added, folder)
    train_reward(after, progress)
    trained = read_json(policy.training_of(name) / "result.json")
    refreshed = _policy(experiment.policy, after, folder)
    return {
        "policy": {key: trained[key] for key in ("base_reward", "reward", "base_distinct_share", "distinct_share", "kl")},
        "added": dict(Counter(row["kind"] for row in added)),
        "held_out": dict(Counter(row["kind"] for row in held_out)),
        "added_before": _mean_scores(policy, name, added),
        "added_after": _mean_scores(refreshed, name, added),
        "held_out_before": _mean_scores(policy, name, held_out),
        "held_out_after": _mean_scores(refreshed, name, held_out),
        "validation_before": read_figures(reward.output),
        "validation_after": read_figures(after.output),
    }


def _policy(experiment: Experiment, reward: RewardExperiment, folder: Path) -> Experiment:
    """The experiment with the reward model as its objective's `model`."""
    [(name, config)] = experiment.objectives.items()
    options = {**config.options, "model": str(reward.output / MODEL_DIRECTORY)}
    return replace(experiment, output=folder, objectives={name: replace(config, options=options)})


def _refreshed(experiment: RefreshExperiment, reward: RewardExperiment, folder: Path) -> RewardExperiment:
    """The reward model going on from its weights with the round's rows."""
    data = replace(
        reward.data,
        path=str(folder / "graded.jsonl"),
        validation_path=str(folder / "validation.jsonl"),
        prompt_column="prompt",
        response_column="response",
        group_column="group",
    )
    return replace(
        reward,
        output=folder / "reward",
        model=str(reward.output / MODEL_DIRECTORY),
        data=data,
        training={**reward.training, **experiment.retraining},
    )


def _write_tables(reward: RewardExperiment, negatives: Sequence[Row], folder: Path) -> None:
    """The reward model's rows with the negatives, and its validation rows as they were."""
    data = load_graded(reward)
    group_of = {row.prompt: row.group for row in [*data.training, *data.validation]}
    lowest = dict.fromkeys(data.names, reward.data.label_range[0])
    added = [
        {"prompt": row["prompt"], "response": row["response"], **lowest, "group": group_of.get(row["prompt"], row["prompt"])}
        for row in negatives
    ]
    training = [*(_row(reward, data.names, row) for row in data.training), *added]
    _write_lines(folder / "validation.jsonl", [_row(reward, data.names, row) for row in data.validation])
    _write_lines(folder / "graded.jsonl", training)


def _row(reward: RewardExperiment, names: Sequence[str], row: Graded) -> Row:
    low, high = reward.data.label_range
    labels = {name: low + target * (high - low) for name, target in zip(names, row.targets, strict=True)}
    return {"prompt": row.prompt, "response": row.response, **labels, "group": row.group}


def _write_lines(path: Path, rows: Sequence[Row]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _find(experiment: RefreshExperiment, policy: Experiment, found: dict[str, Path]) -> None:
    """Writes what the trained policy says wrongly: to training prompts (to be added) and to validation prompts."""
    base = load_base(policy.base)
    prompts = load_prompts(policy.data, policy.seed, is_chat(base.tokenizer))
    [directory] = policy_directories(policy).values()
    trained = PeftModel.from_pretrained(base.model, str(directory)).eval()
    for part, asked in (("negatives", prompts.train), ("held_out", prompts.validation)):
        table = generate(trained, base.tokenizer, list(asked["prompt"]), policy.generation, seed=policy.seed)
        said = [(prompt, text) for prompt, text in zip(table["prompt"], table["completion"], strict=True) if text.strip()]
        _write_lines(found[part], negatives(said, experiment.negatives, policy.seed))


def negatives(said: Sequence[tuple[str, str]], most: int, seed: int) -> list[Row]:
    """Rows (prompt, response, kind) that deserve the lowest grade, at most `most` of each kind.

    `repeated`: the same words, but for case and spacing, to two prompts or more. `mismatched`: an answer under the prompt of
    somebody whom the policy answered otherwise.
    """
    rng = random.Random(seed)
    times = Counter(_words(text) for _, text in said)
    repeated = [(prompt, text, REPEATED) for prompt, text in said if times[_words(text)] > 1]
    mismatched = []
    for prompt, text in said:
        others = [other for other, answer in said if other != prompt and _words(answer) != _words(text)]
        if others:
            mismatched.append((rng.choice(others), text, MISMATCHED))
    chosen = [rng.sample(rows, min(most, len(rows))) for rows in (repeated, mismatched)]
    return [{"prompt": prompt, "response": text, "kind": kind} for rows in chosen for prompt, text, kind in rows]


def _words(text: str) -> str:
    return " ".join(text.casefold().split())


def _mean_scores(policy: Experiment, name: str, rows: Sequence[Row]) -> dict[str, float]:
    """Mean score of the added rows by kind."""
    scores = load_objective(name, policy.objectives[name])([row["prompt"] for row in rows], [row["response"] for row in rows])
    by_kind: dict[str, list[float]] = {}
    for row, score in zip(rows, scores, strict=True):
        if score is not None:
            by_kind.setdefault(row["kind"], []).append(score)
    return {kind: sum(values) / len(values) for kind, values in by_kind.items()}
