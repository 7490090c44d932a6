"""Writes the pages that are made from the program: `python -m docs.generate` (a test fails where they are stale)."""

import argparse
import json
import textwrap
from dataclasses import fields
from pathlib import Path

from emorl.cli import COMMANDS, make_parser
from emorl.config.experiment import Experiment
from emorl.config.fuse import CheckpointsFile
from emorl.config.reward import RefreshExperiment, RewardExperiment
from emorl.config.yaml import describe
from emorl.fusion.operators import methods_markdown
from emorl.objectives.catalogue import EXAMPLE_COMPLETION, catalogue
from emorl.objectives.scale import interval

WIDTH = 106
_HEAD = "<!-- Made by `python -m docs.generate`; change the program, not this page. -->\n\n"


def pages() -> dict[str, str]:
    """File name -> text of each generated page."""
    return {
        "experiment-keys.md": _HEAD + keys_page(),
        "commands.md": _HEAD + commands_page(),
        "objectives.md": _HEAD + objectives_page(),
        "fusion-methods.md": _HEAD + methods_markdown(),
    }


def keys_page() -> str:
    """Every key of the files that emorl reads, with its default in brackets."""
    parts = [
        "# Keys",
        "Every key of an experiment file, with its default in brackets. Each can be set on the command line as "
        "`dotted.key=value`. `emorl keys [BLOCK]` prints the same.",
    ]
    parts = ["\n".join(textwrap.wrap(part, WIDTH)) for part in parts]
    for field in fields(Experiment):
        parts += [f"## {field.name}", _keys(describe(Experiment, only=(field.name,)))]
    others = (
        ("`emorl train-reward`", RewardExperiment, ()),
        ("`emorl refresh-reward`", RefreshExperiment, ("rounds", "negatives", "retraining")),
        ("`emorl fuse` of whole checkpoints", CheckpointsFile, ()),
    )
    for title, kind, only in others:
        parts += [f"## The file of {title}", _keys(describe(kind, only=only))]
    return "\n\n".join(parts) + "\n"


def _keys(text: str) -> str:
    lines = []
    for line in filter(str.strip, text.splitlines()):
        name, _, meaning = line.strip().partition("  ")
        indent = "    "
        lines.append(name)
        lines += textwrap.wrap(meaning, WIDTH - len(indent), initial_indent=indent, subsequent_indent=indent)
    return "```text\n" + "\n".join(lines) + "\n```"


def commands_page() -> str:
    """Every command with its options."""
    [subparsers] = [action for action in make_parser("all")._actions if isinstance(action, argparse._SubParsersAction)]
    parts = ["# Commands", "`emorl COMMAND --help` prints the same, with the keys that the command reads."]
    for name, parser in subparsers.choices.items():
        parts.append(f"## emorl {name}\n\n{COMMANDS[name]}\n")
        parts[-1] += "".join(f"\n{_option(action)}" for action in parser._actions if action.dest != "help")
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _option(action: argparse.Action) -> str:
    """One option, or one argument, as an item of a list."""
    value = action.metavar if isinstance(action.metavar, str) else "" if action.nargs == 0 else action.dest.upper()
    shown = f"{', '.join(action.option_strings)} {value}".strip()
    meaning = (action.help or "").replace("%(default)s", str(action.default))
    return "\n".join(textwrap.wrap(f"- `{shown}`: {meaning}", WIDTH, subsequent_indent="  ", break_on_hyphens=False))


def objectives_page() -> str:
    """Every registered objective, with its options."""
    parts = [
        "# Objectives",
        "Every registered objective function. `emorl objectives` prints the same, with the score of one example, "
        f"“{EXAMPLE_COMPLETION}”. How to write one of your own: [rewards](rewards.md).",
    ]
    for entry in catalogue():
        options = ", ".join(f"`{name}: {json.dumps(value)}`" for name, value in entry.options.items())
        needs = ", ".join(f"`{name}`" for name in entry.needs)
        parts += [f"## {entry.name}", f"{entry.scores.rstrip(':')}. Range: {interval(entry.range)}.".replace("..", ".")]
        parts += [f"Needs {needs}."] if needs else []
        parts += [f"Options: {options}."] if options else []
    return "\n\n".join("\n".join(textwrap.wrap(part, WIDTH, break_on_hyphens=False)) for part in parts) + "\n"


def main() -> None:
    for name, text in pages().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
