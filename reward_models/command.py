"""The training command that every reward model shares: read, train, measure, save whole or not at all."""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from reward_models.agreement import Score, markdown_table
from reward_models.pair_data import Pair
from reward_models.sentence_pair import HeadTraining, train


class Labelled(Protocol):
    """Pairs as labelled by people, before negatives are made; a reward model's own data may hold more."""

    @property
    def training(self) -> list[Pair]: ...

    @property
    def stopping(self) -> list[Pair]: ...


Data = TypeVar("Data", bound=Labelled)


@dataclass(frozen=True)
class RewardModel(Generic[Data]):
    """What one reward model's script brings: its data, the negatives it has to refuse, what is measured, its model card."""

    read_data: Callable[[Path, int], Data]
    with_negatives: Callable[[Sequence[Pair], int], list[Pair]]
    measure: Callable[[Score, Data, int], dict[str, float]]
    card: str


def run(model: RewardModel[Data], description: str | None, argv: Sequence[str] | None) -> int:
    """One training command; 2 for a mistake in the call, with one line that says which."""
    arguments = _parser(description).parse_args(argv)
    try:
        if arguments.output.exists() and (not arguments.output.is_dir() or any(arguments.output.iterdir())):
            raise ValueError(f"{arguments.output} holds something already; give a new --output")
        data = model.read_data(arguments.data, arguments.seed)
        training = model.with_negatives(data.training, arguments.seed)
        stopping = model.with_negatives(data.stopping, arguments.seed + 1)
        settings = HeadTraining(arguments.encoder, arguments.seed)
        print(f"{len(training)} training pairs, {len(stopping)} for early stopping; encoder {settings.encoder}", flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=arguments.output.parent, prefix=".training-") as scratch:
            folder = Path(scratch) / arguments.output.name
            started = time.monotonic()
            score = train(training, stopping, settings, folder)
            seconds = time.monotonic() - started
            print(f"trained in {seconds:.0f} s; measuring", flush=True)
            figures = model.measure(score, data, arguments.seed)
            table = markdown_table(figures)
            facts = {"encoder": settings.encoder, "seed": settings.seed, "pairs": len(training), "seconds": seconds}
            (folder / "metrics.json").write_text(json.dumps({**facts, **figures}, indent=2) + "\n", encoding="utf-8")
            (folder / "README.md").write_text(model.card.format(figures=table, **facts), encoding="utf-8")
            os.replace(folder, arguments.output)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(f"{table}\nsaved to {arguments.output}")
    return 0


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the JSON-lines files")
    parser.add_argument(
        "--encoder",
        required=True,
        metavar="PATH_OR_HUB_ID",
        help="a sentence encoder whose mean-pooled states are embeddings, e.g. sentence-transformers/all-MiniLM-L6-v2",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="a new folder for head, metrics and model card"
    )
    parser.add_argument("--seed", type=int, default=0, help="of splits, negatives, head and batches (default 0)")
    return parser
