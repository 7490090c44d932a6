"""What was said and what was answered, from all the dialogue files: responses by people, without grades."""

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from reward_models.pair_data import Pair, mismatched, read_rows

SOURCES = ("pair", "epitome", "counselchat", "esconv", "empathetic_dialogues", "annomi")
_ANSWER_WORDS = 60


def responses(folder: Path, per_source: int, seed: int) -> list[Pair]:
    """Up to `per_source` pairs of each source, target 1, group one dialogue or prompt; kind names the source."""
    result = []
    for number, source in enumerate(SOURCES):
        pairs = [pair for pair in _READERS[source](folder) if len(pair.prompt.split()) >= 4 and len(pair.response.split()) >= 4]
        result += random.Random(seed + number).sample(pairs, min(per_source, len(pairs)))
    return result


def within_source(pairs: Sequence[Pair], rng: random.Random) -> list[Pair]:
    """Each response under a prompt of the same source, so that style alone tells nothing."""
    wrong = []
    for source in SOURCES:
        own = [pair for pair in pairs if pair.kind == source]
        if len({pair.group for pair in own}) > 1:
            wrong += mismatched(own, 1, rng)
    return wrong


def _pair(folder: Path) -> Iterator[Pair]:
    fields = ["prompt", "complex_reflections", "simple_reflections", "non_reflections"]
    for row in read_rows(folder / "pair_train.jsonl", fields):
        for field in fields[1:]:
            yield from (Pair(row["prompt"], text, 1.0, "pair", f"pair {row['prompt']}") for text in row[field])


def _epitome(folder: Path) -> Iterator[Pair]:
    for row in read_rows(folder / "epitome_train.jsonl", ["seeker", "response"]):
        yield Pair(row["seeker"], row["response"], 1.0, "epitome", f"epitome {row['seeker']}")


def _counselchat(folder: Path) -> Iterator[Pair]:
    for row in read_rows(folder / "counselchat_train.jsonl", ["question", "answer"]):
        answer = " ".join(row["answer"].split()[:_ANSWER_WORDS])
        yield Pair(row["question"], answer, 1.0, "counselchat", f"counselchat {row['question']}")


def _turns(path: Path, source: str, asks: str, answers: str) -> Iterator[Pair]:
    """Each turn of `answers` right behind one of `asks`."""
    for number, dialogue in enumerate(read_rows(path, ["turns"])):
        turns: Sequence[dict[str, str]] = dialogue["turns"]
        for before, turn in pairwise(turns):
            if before["role"] == asks and turn["role"] == answers:
                yield Pair(before["text"], turn["text"], 1.0, source, f"{source} {number}")


_READERS = {
    "pair": _pair,
    "epitome": _epitome,
    "counselchat": _counselchat,
    "esconv": lambda folder: _turns(folder / "esconv_train.jsonl", "esconv", "seeker", "supporter"),
    "empathetic_dialogues": lambda folder: _turns(
        folder / "empathetic_dialogues_train.jsonl", "empathetic_dialogues", "speaker", "listener"
    ),
    "annomi": lambda folder: _turns(folder / "annomi_train.jsonl", "annomi", "client", "therapist"),
}
