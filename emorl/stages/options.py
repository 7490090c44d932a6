"""Options that the commands on an experiment share."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from emorl.config.experiment import Experiment, load_experiment
from emorl.config.yaml import describe

_HELP = """\
EXPERIMENT is a YAML file; any key can be set on the command line as dotted.key=value, for example
  {program} experiment.yaml train.grpo.max_steps=50 search.levels=3
Keys that it reads, with defaults (`emorl keys` prints all of them):
"""


def add_experiment(parser: argparse.ArgumentParser, *blocks: str) -> None:
    """The experiment file, overrides and `--json`; `--help` describes these blocks of it."""
    parser.add_argument("experiment", type=Path, metavar="EXPERIMENT", help="experiment.yaml")
    add_overrides(parser)
    if _wants_help():
        parser.epilog = _HELP.format(program=parser.prog) + describe(Experiment, only=("output", "base", "data", *blocks))


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Settings on the command line, and `--json`."""
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings that replace those of the file")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")


def add_keys(parser: argparse.ArgumentParser, kind: type, before: str) -> None:
    """`--help` describes all keys of another kind of file, behind an example."""
    if _wants_help():
        settable = "Any key can be set on the command line as dotted.key=value. Keys (with defaults):"
        parser.epilog = f"{before}{settable}\n{describe(kind)}"


def _wants_help() -> bool:
    return bool({"--help", "-h"} & set(sys.argv))


def load(options: argparse.Namespace, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of the file, with the command line's settings and more of them."""
    return load_experiment(options.experiment, [*options.overrides, *overrides])
