"""What the training commands share: write the made rows, run emorl's reward-model stage, measure, write the model card."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import transformers

from emorl.config import UserError
from emorl.config.reward import RewardDataConfig, RewardExperiment
from emorl.runs.console import Console
from emorl.runs.layout import MODEL
from emorl.runs.run import read_json, write_json, write_text
from emorl.stages.train_reward import train_reward
from emorl.training.reward.card import figures_table

TRAINING = {"learning_rate": 2e-4, "num_train_epochs": 4}
FAST_ON_CPU = {"attn_implementation": "eager", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""MiniLM trains 1.8 times faster so; a frozen layer and early stopping hold overfitting back instead of dropout"""
_HEADING = "## Measured on data held out by this script"
_OBJECTIVE = """These figures are of the objective below; train policies on it. The bare `classifier`, where this card names
one, is not guarded against sentences that fit everyone.

```yaml
{name}: {{function: "{objective}", model: {folder}}}
```"""


@dataclass(frozen=True)
class Rows:
    """Rows as JSON-lines tables with columns prompt, response, group and the labels."""

    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options every training command has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the JSON-lines files")
    result.add_argument(
        "--encoder",
        required=True,
        metavar="PATH_OR_HUB_ID",
        help="the encoder that is trained; here all-MiniLM-L6-v2, for real use a larger one such as FacebookAI/roberta-base",
    )
    result.add_argument(
        "--gate-encoder", metavar="PATH_OR_HUB_ID", help="sentence encoder of the gate, stays as it is (default: --encoder)"
    )
    result.add_argument("--output", type=Path, required=True, metavar="DIR", help="run directory; the model is in DIR/model")
    result.add_argument("--seed", type=int, default=0, help="of splits, made negatives and training (default 0)")
    result.add_argument("--negatives", type=Path, action="append", default=[], metavar="FILE",
                        help="JSON lines with prompt and response that deserve 0, e.g. of an adversarial refresh")  # fmt: skip
    return result


def train_rows(arguments: argparse.Namespace, rows: Rows, settings: dict[str, Any]) -> Path:
    """Trains on the rows by `emorl train-reward`; returns the model's folder. Continues after a kill."""
    for name, part in (("train", rows.training), ("validation", rows.validation)):
        lines = [json.dumps(row, ensure_ascii=False) for row in part]
        write_text(arguments.output / "data" / f"{name}.jsonl", "\n".join(lines) + "\n")
    data = RewardDataConfig(
        path=str(arguments.output / "data" / "train.jsonl"),
        validation_path=str(arguments.output / "data" / "validation.jsonl"),
        group_column="group",
        **settings.pop("data"),
    )
    experiment = RewardExperiment(output=arguments.output, model=arguments.encoder, data=data, seed=arguments.seed, **settings)
    train_reward(experiment, Console())
    return experiment.output / MODEL


def finish(folder: Path, objective: str, figures: dict[str, float]) -> None:
    """Adds the figures and how to use `objective` to `metrics.json` and the model card, and prints them."""
    write_json(folder / "metrics.json", {**read_json(folder / "metrics.json"), **figures})
    card = (folder / "README.md").read_text(encoding="utf-8").partition(_HEADING)[0].rstrip()
    use = _OBJECTIVE.format(name=folder.resolve().parent.name, objective=objective, folder=folder)
    write_text(folder / "README.md", f"{card}\n\n{_HEADING}\n\n{use}\n\n{figures_table(figures)}\n")
    print(f"{figures_table(figures)}\nsaved to {folder}")


def run(main: Callable[[argparse.Namespace], None], description: str | None, argv: Sequence[str] | None) -> int:
    """One training command; 2 for a mistake in the call, with one line that says which."""
    arguments = parser(description).parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        main(arguments)
    except (UserError, ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0
