"""One self-contained HTML page of whatever has run in a directory (`emorl report RUN`)."""

import argparse
import json
from pathlib import Path

from emorl.runs.console import Console


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="RUN", help="output directory of an experiment")
    parser.add_argument("--json", action="store_true", help="print where it is as JSON")


def command(options: argparse.Namespace) -> None:
    from emorl.config.experiment import load_kept_experiment

    experiment = load_kept_experiment(options.directory)  # a folder that is no run's is refused at once
    from emorl.stages.search import restore_trials

    restore_trials(experiment)
    from emorl.reporting.report import write_report

    report = write_report(options.directory)
    if options.json:
        print(json.dumps({"report": str(report)}))
    else:
        Console().say(f"report: {report}")
