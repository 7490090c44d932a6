"""The paper's questions as prompts with answers: GSM8K, MMLU and MBPP from the hub (`python -m recipes.rlae.questions gsm8k`).

python -m recipes.rlae.questions gsm8k mmlu mbpp
emorl dynamic recipes/rlae/gsm8k.yaml
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import load_dataset

LETTERS = "ABCD"


def gsm8k(row: Mapping[str, Any]) -> dict[str, Any]:
    """A word problem; the reference's last line is "#### 42"."""
    return {"prompt": f"{row['question']}\nThink step by step and end with: The answer is NUMBER.", "answer": row["answer"]}


def mmlu(row: Mapping[str, Any]) -> dict[str, Any]:
    """Four choices; `answer` is the index of the right one."""
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=True))
    prompt = f"{row['question']}\n{choices}\nThink, then end with: The answer is LETTER."
    return {"prompt": prompt, "answer": LETTERS[row["answer"]], "subject": row["subject"]}


def mbpp(row: Mapping[str, Any]) -> dict[str, Any]:
    """A Python function to write; one of its tests says what it is called."""
    prompt = f"{row['text']}\nYour function has to pass: {row['test_list'][0]}\nAnswer with one Python code block."
    return {"prompt": prompt, "test_list": row["test_list"], "setup": row["test_setup_code"]}


SOURCES: Mapping[str, tuple[str, str, Mapping[str, str], Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "gsm8k": ("openai/gsm8k", "main", {"train": "train", "test": "test"}, gsm8k),
    "mmlu": ("cais/mmlu", "all", {"train": "validation", "test": "test"}, mmlu),
    "mbpp": ("google-research-datasets/mbpp", "full", {"train": "train", "test": "test"}, mbpp),
}
"""hub id, subset, our part -> its split (MMLU has nothing to train on but 1,531 validation questions), row -> prompt"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=list(SOURCES))
    parser.add_argument("--output", type=Path, default=Path("runs/rlae/questions"), help="(%(default)s)")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        hub, subset, splits, convert = SOURCES[name]
        for part, split in splits.items():
            rows = [convert(row) for row in load_dataset(hub, subset, split=split)]  # type: ignore[arg-type]
            file = options.output / f"{name}_{part}.jsonl"
            file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            print(f"{file}: {len(rows)} questions")


if __name__ == "__main__":
    main()
