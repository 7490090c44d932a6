"""The command every reward model is trained with: read, train, measure, then save everything or nothing."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, TypeVar

from reward_models.agreement import Score, markdown_table
from reward_models.pair_data import Pair
from reward_models.sentence_pair import HeadTraining, train


class Split(Protocol):
    """Labelled pairs of one reward model, split by prompt; what else it holds is for its own `measure`."""

    @property
    def training(self) -> list[Pair]: ...

    @property
    def stopping(self) -> list[Pair]: ...


Data = TypeVar("Data", bound=Split)

USE = """Use the trained folder in an experiment's YAML:

    objectives:
      NAME:
        function: reward_models.sentence_pair:SentencePair
        model: ./OUTPUT        # with the dot: a path, not a hub id

OUTPUT/README.md is its model card: read how far it can be trusted before optimising it.
"""


def parser(description: str) -> argparse.ArgumentParser:
    """The options every reward model's training shares."""
    result = argparse.ArgumentParser(
        description=description, epilog=USE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the JSON-lines files")
    result.add_argument(
        "--encoder",
        required=True,
        metavar="PATH_OR_HUB_ID",
        help="sentence encoder that transformers can load, such as sentence-transformers/all-MiniLM-L6-v2; it is not "
        "copied: the saved model names it by what you type here",
    )
    result.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="new or empty folder; appears when all is done"
    )
    result.add_argument("--seed", type=int, default=0, help="splits, negatives, head and batch order (default 0)")
    return result


def train_and_measure(
    argv: Sequence[str] | None,
    description: str,
    card: str,
    read_data: Callable[[Path, int], Data],
    with_negatives: Callable[[Sequence[Pair], int], list[Pair]],
    measure: Callable[[Score, Data, int], dict[str, float]],
) -> int:
    """Runs the command and returns its exit code: 2, with one line, for a mistake in the call.

    Beside the model stand the model card (`card`, then the figures) and metrics.json. A run that is killed leaves nothing
    at --output, at worst a hidden folder next to it.
    """
    arguments = parser(description).parse_args(argv)
    started = time.monotonic()
    try:
        _make_way_to(arguments.output)
        data = read_data(arguments.data, arguments.seed)
    except ValueError as error:
        return _mistake(error)
    training = with_negatives(data.training, arguments.seed)
    stopping = with_negatives(data.stopping, arguments.seed + 1)
    settings = HeadTraining(arguments.encoder, arguments.seed)
    print(f"{len(training)} training pairs, {len(stopping)} for early stopping; encoder {settings.encoder}", flush=True)
    with TemporaryDirectory(dir=arguments.output.parent, prefix=f".{arguments.output.name}-") as unfinished:
        folder = Path(unfinished) / "model"
        try:
            model = train(training, stopping, settings, folder)
        except ValueError as error:
            return _mistake(error)
        seconds = round(time.monotonic() - started, 1)
        print(f"trained in {seconds} s; measuring", flush=True)
        figures = measure(model, data, arguments.seed)
        facts = {**asdict(settings), "training_pairs": len(training), "stopping_pairs": len(stopping), "seconds": seconds}
        (folder / "metrics.json").write_text(json.dumps({**facts, **figures}, indent=2) + "\n", encoding="utf-8")
        table = markdown_table(figures)
        origin = f"Encoder {settings.encoder}, seed {settings.seed}, {len(training)} training pairs, {seconds} s."
        (folder / "README.md").write_text(f"{card}\n{table}\n\n{origin}\n", encoding="utf-8")
        folder.rename(arguments.output)
    print(table)
    print(f"saved to {arguments.output}")
    return 0


def _mistake(error: ValueError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _make_way_to(output: Path) -> None:
    """Makes the folders above `output`; ValueError where it cannot be, or is not an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} is not an empty folder: name a new one")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {output} cannot be made: {error.strerror}") from None
