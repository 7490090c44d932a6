"""The whole job on an embedded example, whose policy and reward models are made first (`emorl quickstart`)."""

import argparse
from pathlib import Path

from emorl.runs.console import Console
from emorl.stages.run import run_all


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="where it goes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")


def command(options: argparse.Namespace) -> None:
    from emorl.quickstart.experiment import quickstart_experiment

    progress = Console()
    run_all(quickstart_experiment(options.output, options.seed, progress), progress, options.json)
