"""Adversarial refresh: a policy finds what its reward model pays without merit, and the reward model learns to refuse it
(`emorl refresh-reward refresh.yaml`).

A round: train a policy on the reward model by GRPO; take what the policy says, word for word, to several prompts, and its
answers under other people's prompts; add both as rows of the lowest grade; go on training the reward model with them.
Every step is a run of its own below OUTPUT/round-N, so that a killed refresh continues where it was. Before and after are
compared on the added rows, on rows made alike from what the policy says to the experiment's validation prompts, which are
never trained on, and on the reward model's validation rows, which never change.
"""

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

from emorl.config.experiment import Experiment
from emorl.config.reward import RefreshExperiment, RewardExperiment, load_refresh_experiment
from emorl.config.yaml import as_mapping
from emorl.runs.console import Console
from emorl.runs.layout import MODEL
from emorl.runs.progress import Progress, Silent
from emorl.runs.results import RefreshResult, RefreshRound, as_json
from emorl.stages.materials import Materials
from emorl.stages.options import add_keys, add_overrides
from emorl.stages.stage import perform, work_once
from emorl.stages.train import policy_stage
from emorl.stages.train_reward import train_reward

_EXAMPLE = """\
FILE is YAML, for example
  reward: {output: runs/politeness, model: …, data: …, loss: ranking}    # as for train-reward
  policy:                                                                # as for train, with one objective
    output: runs/politeness-refresh
    base: {model: Qwen/Qwen3-0.6B}
    data: {path: prompts.jsonl}
    objectives: {polite: classifier}
    train: {grpo: {beta: 0.01, max_steps: 100}}                          # a weak anchor finds more to refuse
  retraining: {num_train_epochs: 1}
"""
_PARTS = ("negatives", "held_out")


def refresh(experiment: RefreshExperiment, progress: Progress | None = None) -> RefreshResult:
    """All rounds; a finished refresh is only read, an interrupted one goes on.

    Raises:
        UserError: as `train_reward` and training a policy.
    """
    progress = progress or Silent()
    output = experiment.policy.output

    def work(run: object) -> RefreshResult:
        reward, rounds = experiment.reward, []
        train_reward(reward, progress)
        for number in range(1, experiment.rounds + 1):
            rounds.append(_round(experiment, reward, output / f"round-{number}", progress))
            reward = _refreshed(experiment, reward, output / f"round-{number}")
        return RefreshResult(str(reward.output / MODEL), rounds)

    return work_once(output, "refresh", as_mapping(experiment), RefreshResult, work, progress)


def _round(experiment: RefreshExperiment, reward: RewardExperiment, folder: Path, progress: Progress) -> RefreshRound:
    from emorl.training.reward.refresh import mean_scores, write_tables

    [name] = experiment.policy.objectives
    materials = Materials(_policy(experiment.policy, reward, folder))
    trained = perform(policy_stage(materials.experiment, name), materials.experiment, progress, materials)
    files = {part: folder / f"{part}.jsonl" for part in _PARTS}
    if not all(path.exists() for path in files.values()):
        _find(experiment, materials, files)
    added, held_out = ([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in files.values())
    after = _refreshed(experiment, reward, folder)
    if not (folder / "graded.jsonl").exists():
        write_tables(reward, added, folder)
    figures = train_reward(after, progress).figures
    objective, refreshed = (
        materials.of(_policy(experiment.policy, model, folder)).objective(name) for model in (reward, after)
    )
    shown = ("base_reward", "reward", "base_distinct_share", "distinct_share", "kl")
    return RefreshRound(
        policy={key: getattr(trained, key) for key in shown},
        added=dict(Counter(row["kind"] for row in added)),
        held_out=dict(Counter(row["kind"] for row in held_out)),
        added_before=mean_scores(objective, added),
        added_after=mean_scores(refreshed, added),
        held_out_before=mean_scores(objective, held_out),
        held_out_after=mean_scores(refreshed, held_out),
        validation_before=train_reward(reward).figures,
        validation_after=figures,
    )


def _policy(experiment: Experiment, reward: RewardExperiment, folder: Path) -> Experiment:
    """The experiment with the reward model as its objective's `model`."""
    [(name, config)] = experiment.objectives.items()
    options = {**config.options, "model": str(reward.output / MODEL)}
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
        model=str(reward.output / MODEL),
        data=data,
        training={**reward.training, **experiment.retraining},
    )


def _find(experiment: RefreshExperiment, materials: Materials, files: dict[str, Path]) -> None:
    """Writes what the trained policy says wrongly: to training prompts (to be added) and to validation prompts."""
    from emorl.evaluation.scoring import generate
    from emorl.training.reward.refresh import negatives, write_lines

    policy, tokenizer = materials.experiment, materials.base.tokenizer
    [name] = policy.policy_names
    trained = materials.peft_policy(name)
    for part, asked in zip(_PARTS, (materials.splits.train, materials.splits.validation), strict=True):
        table = generate(trained, tokenizer, list(asked["prompt"]), policy.generation, seed=policy.seed)
        answers = [(prompt, text) for prompt, text in zip(table["prompt"], table["completion"], strict=True) if text.strip()]
        write_lines(files[part], negatives(answers, experiment.negatives, policy.seed))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", type=Path, metavar="FILE", help="YAML file of a reward model and its policy")
    add_overrides(parser)
    add_keys(parser, RefreshExperiment, _EXAMPLE)


def command(options: argparse.Namespace) -> None:
    from emorl.reporting.reward_tables import refresh_table

    result = refresh(load_refresh_experiment(options.experiment, options.overrides), Console())
    print(json.dumps(as_json(result)["rounds"], indent=2) if options.json else refresh_table(result.rounds))
