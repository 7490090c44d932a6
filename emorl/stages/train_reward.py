"""A reward model from graded responses or pairs, calibrated, with a model card (`emorl train-reward reward.yaml`)."""

import argparse
import json
from pathlib import Path

from emorl.config.reward import RewardExperiment, load_reward_experiment
from emorl.config.yaml import as_mapping
from emorl.runs.console import Console
from emorl.runs.progress import Progress, Silent
from emorl.runs.results import RewardResult
from emorl.stages.options import add_keys, add_overrides
from emorl.stages.stage import work_once

_EXAMPLE = """\
FILE is YAML, for example
  output: runs/politeness
  model: sentence-transformers/all-MiniLM-L6-v2
  data: {path: graded.jsonl, labels: [grade], label_range: [0, 2]}    # columns prompt, response, grade
  loss: ranking
and for pairs
  data: {path: pairs.jsonl, chosen_column: chosen, rejected_column: rejected}    # columns prompt, chosen, rejected
The model is then an objective, {function: classifier, model: runs/politeness/model}.
"""


def train_reward(experiment: RewardExperiment, progress: Progress | None = None) -> RewardResult:
    """Trains, calibrates and measures one reward model, which is then in `model/` of its output, with its card.

    A finished run is only read, an interrupted one goes on from its last complete checkpoint.

    Raises:
        UserError: wrong data or settings, no such model, or a run directory that holds another run.
    """
    from emorl.training.reward.data import load_graded
    from emorl.training.reward.model import train_model, training_arguments

    progress = progress or Silent()
    arguments, data = training_arguments(experiment), load_graded(experiment)
    identity = {key: value for key, value in as_mapping(experiment).items() if key not in ("output", "description")}
    identity["rows"] = data.fingerprint()
    return work_once(
        experiment.output,
        "train-reward",
        identity,
        RewardResult,
        lambda run: train_model(experiment, data, arguments, run, progress),
        progress,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", type=Path, metavar="FILE", help="YAML file of one reward model")
    add_overrides(parser)
    add_keys(parser, RewardExperiment, _EXAMPLE)


def command(options: argparse.Namespace) -> None:
    figures = train_reward(load_reward_experiment(options.experiment, options.overrides), Console()).figures
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    from emorl.training.reward.card import figures_table

    print(figures_table(figures))
