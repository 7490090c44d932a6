"""The keys of an experiment file (`emorl keys [BLOCK]`)."""

import argparse
from dataclasses import fields

from emorl.config import UserError, nearest
from emorl.config.experiment import Experiment
from emorl.config.yaml import describe


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("block", nargs="?", metavar="BLOCK", help="such as train or search; all of them by default")


def command(options: argparse.Namespace) -> None:
    names = [field.name for field in fields(Experiment)]
    if options.block is not None and options.block not in names:
        raise UserError(f"no block of an experiment is called {options.block!r}; {nearest(options.block, names)}")
    print(describe(Experiment, only=() if options.block is None else (options.block,)).strip("\n"))
