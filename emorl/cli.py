"""The command line: a table of commands; `emorl X` is `emorl/stages/X.py`, imported when it is asked for."""

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version

from emorl.config import UserError
from emorl.config.secrets import masked
from emorl.runs.faults import faults_as_lines

COMMANDS = {
    "quickstart": "The whole job on an embedded example: train, search, compare, report.",
    "init": "Write a commented experiment file that runs as it is.",
    "run": "All stages of an experiment; finished ones are skipped, an interrupted one continues.",
    "train": "Train one LoRA policy per objective with GRPO, SCST or DPO, or one for all (train.mode).",
    "samples": "Sample the base's answers to the training prompts, once for all policies that are trained offline (DPO).",
    "search": "Search the aggregation weights of the trained policies, and save the ensemble that was found.",
    "evaluate": "Compare what was found with its rivals on test prompts.",
    "compare": "Train the ensemble and its rivals at the same budget, once per seed, and compare them on test prompts.",
    "fuse": "Fuse trained policies into one, or whole checkpoints tensor by tensor on disk.",
    "distill": "Turn the ensemble at chosen weights into one adapter, or into one for the whole front.",
    "dynamic": "Train agents that set the ensemble's weights anew for every span of text, and compare them with fixed weights.",
    "report": "Write one self-contained HTML report of a run directory.",
    "generate": "Answer prompts with the point of the front that suits your preference, or with one policy.",
    "serve": "Serve a run in OpenAI's form, a trade-off per request, with a page to choose it.",
    "export": "Export what was found for other engines: one adapter, one merged model, or GGUF LoRAs for llama.cpp.",
    "objectives": "List the registered objectives; `check` runs those of an experiment on edge cases.",
    "train-reward": "Train a reward model on graded responses, to be used as an objective.",
    "refresh-reward": "Train a policy against a reward model, and teach it to refuse what it fell for.",
    "keys": "Print the keys of an experiment file, or of one block of it, with defaults and meanings.",
    "completion": "Print a script that completes commands and files in bash or zsh.",
}
"""command -> what it does, in the order of `emorl --help`"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. A user's mistake is one line on standard error and exit code 2, never a traceback; a check that fails
    exits with 1."""
    _quiet_libraries()
    sys.path.append(os.getcwd())  # objectives named package.module:attribute may lie beside the experiment
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser(words[0] if words else None)
    if not words:
        parser.print_help()
        return 0
    options = _parse(parser, words)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        with faults_as_lines():
            return options.run(options) or 0
    except UserError as error:
        print(masked(f"emorl {options.command}: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nemorl {options.command}: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """The options; overrides may also stand behind an option, which argparse alone does not take."""
    options, rest = parser.parse_known_args(words)
    strange = [word for word in rest if word.startswith("-") or "=" not in word]
    if strange or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(strange or rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _quiet_libraries() -> None:
    """Their progress bars and advice would tear ours apart; what a user must know, our own lines say."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: huge pages for large tensors on a CPU
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL's use of names that transformers has renamed


def make_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser of all commands, with the options of `command`; of all of them where it is "all"."""
    parser = argparse.ArgumentParser(
        prog="emorl", description="Fine-tune a language model towards several objectives and steer between them."
    )
    parser.add_argument("--version", action="version", version=f"emorl {version('emorl')}")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        one = parsers.add_parser(name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if command in (name, "all"):
            module = importlib.import_module(f"emorl.stages.{name.replace('-', '_')}")
            one.set_defaults(run=module.command, whole_parser=lambda: make_parser("all"))
            module.add_options(one)
    return parser
