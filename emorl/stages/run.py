"""All stages of an experiment in their order: train, search, evaluate, report (`emorl run experiment.yaml`)."""

import argparse

from emorl.config.experiment import Experiment
from emorl.config.places import check_places
from emorl.runs.console import Console
from emorl.runs.progress import Progress
from emorl.stages import evaluate, search, train
from emorl.stages.materials import Materials
from emorl.stages.options import add_experiment, load


def run_all(experiment: Experiment, progress: Progress, as_json: bool) -> None:
    """Each stage is checked before the first one works, and all of them share what is loaded."""
    check_places(experiment)
    for stage in (search, evaluate, train):  # cheap mistakes first: training's settings wait for TRL
        stage.check(experiment)
    materials = Materials(experiment)
    for stage in (train, search, evaluate):
        stage.performed(experiment, progress, materials)
    from emorl.reporting.report import write_report

    report = write_report(experiment.output)
    evaluate.print_evaluation(experiment.output, as_json)
    progress.say(f"report: {report}")


def add_options(parser: argparse.ArgumentParser) -> None:
    blocks = ("objectives", "seed", "generation", "train", "value", "ensemble", "search", "evaluate", "policies")
    add_experiment(parser, *blocks)


def command(options: argparse.Namespace) -> None:
    run_all(load(options), Console(), options.json)
