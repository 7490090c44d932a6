"""What objectives there are; those of an experiment on texts that break reward functions (`emorl objectives [check FILE]`)."""

import argparse
import json

from emorl.stages.materials import Materials
from emorl.stages.options import add_experiment, load


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    summary = "Score edge cases with every objective of an experiment; exit code 1 if any of its checks fails."
    check = parser.add_subparsers(metavar="check").add_parser(
        "check", help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_experiment(check, "objectives")
    check.set_defaults(run=check_experiment, command="objectives check")


def command(options: argparse.Namespace) -> None:
    from emorl.objectives.catalogue import catalogue
    from emorl.reporting.objective_tables import catalogue_json, print_catalogue

    if options.json:
        print(json.dumps(catalogue_json(catalogue()), indent=2))
    else:
        print_catalogue(catalogue())


def check_experiment(options: argparse.Namespace) -> int:
    """The objectives of an experiment on edge cases; 1 where one of them fails."""
    from emorl.objectives.loading import check_objectives

    experiment = load(options)
    check_objectives(experiment.objectives)
    from emorl.objectives.check import check_edge_cases
    from emorl.reporting.objective_tables import checks_json, print_checks

    materials = Materials(experiment)
    row = materials.splits.train[0]
    results = [check_edge_cases(objective, row) for objective in materials.objectives]
    if options.json:
        print(json.dumps(checks_json(results), indent=2, ensure_ascii=False))
    else:
        print_checks(results)
    return 0 if all(result.passed for result in results) else 1
