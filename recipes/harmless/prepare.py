"""Pairs and prompts of Anthropic's HH (harmless) as files that emorl reads: conversations, short ones, no prompt in both.

python -m recipes.harmless.prepare --data ../shared/data/hh_harmless_train.jsonl --output runs/harmless/data
"""

import argparse
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

from emorl.runs.run import write_text

_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant): ")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def as_turns(prompt: str) -> list[dict[str, str]]:
    """A prompt of HH, `Human: …` and `Assistant: …` in turn, as a conversation.

    >>> as_turns("Human: Hi\\n\\nAssistant: Hello\\n\\nHuman: Who are you?")[1:]
    [{'role': 'assistant', 'content': 'Hello'}, {'role': 'user', 'content': 'Who are you?'}]
    """
    _, *parts = _TURN.split(prompt)
    speakers, texts = parts[::2], parts[1::2]
    return [{"role": _ROLES[who], "content": text.strip()} for who, text in zip(speakers, texts, strict=True)]


def as_answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text.strip()}]


def as_pairs(rows: Sequence[dict[str, str]]) -> list[dict]:
    """Rows of HH as pairs of conversations in TRL's format; those with an empty answer are left out."""
    return [
        {
            "prompt": as_turns(row["prompt"]),
            "chosen": as_answer(row["chosen"]),
            "rejected": as_answer(row["rejected"]),
        }
        for row in rows
        if row["chosen"].strip() and row["rejected"].strip()
    ]


def words(pair: dict) -> int:
    """Of a prompt with its longer answer."""
    texts = [" ".join(turn["content"] for turn in pair[part]) for part in ("prompt", "chosen", "rejected")]
    prompt, *answers = (len(text.split()) for text in texts)
    return prompt + max(answers)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="hh_harmless_train.jsonl")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="gets pairs, all_pairs, prompts and a bank of questions"
    )
    parser.add_argument("--words", type=int, default=60, help="most of a pair in pairs.jsonl (%(default)s)")
    parser.add_argument("--prompts", type=int, default=136, help="kept apart for the experiment (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    options = parser.parse_args(arguments)
    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
    pairs = as_pairs(rows)
    short = list({json.dumps(pair["prompt"]): None for pair in pairs if words(pair) <= options.words})
    apart = random.Random(options.seed).sample(short, options.prompts)
    every = [pair for pair in pairs if json.dumps(pair["prompt"]) not in set(apart)]
    files = {
        "pairs": [pair for pair in every if words(pair) <= options.words],
        "all_pairs": every,
        "prompts": [{"prompt": json.loads(prompt)} for prompt in apart],
    }
    for name, content in files.items():
        write_text(options.output / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content))
    bank = [" ".join(turn["content"] for turn in pair["prompt"] if turn["role"] == "user") for pair in files["pairs"]]
    write_text(options.output / "bank.txt", "".join(" ".join(line.split()) + "\n" for line in dict.fromkeys(bank)))
    print(f"{options.output}: " + ", ".join(f"{len(content)} {name}" for name, content in files.items()))


if __name__ == "__main__":
    main()
