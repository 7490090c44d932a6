"""Measures the objective `likelihood` as a fluency reward under any causal language model; nothing is trained.

    python -m reward_models.fluency.measure --data ../shared/data --model ../shared/models/counsel-3m \\
        --output runs/reward_models/fluency

Separation is of real responses from copies of them with their words in random order: pair by pair, and as AUC over all.
Two or three words often make sense in another order ("Are you?") and carry too little probability to tell, so responses
of at least `SHORTEST` words count, and copies that came out equal are left out.
"""

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from emorl.evaluation.agreement import auc
from emorl.objectives.models.likelihood import Likelihood
from reward_models.agreement import Score, best_fixed_response, pair_scores
from reward_models.pair_data import CORRUPTIONS, GENERIC_RESPONSES, Pair, read_rows, word_salad

SHORTEST = 5  # words of a response whose shuffled copy must score less
LONGEST = 120  # words of prompt and response together: what fits into the 256 tokens that counsel-3m reads
SAMPLE = 100  # responses per source
CANDIDATES = 30  # for the best fixed response, besides the generic sentences
REFLECTIONS = ("complex_reflections", "simple_reflections")
DIALOGUES = {  # file, who asks, who answers
    "AnnoMI": ("annomi_train.jsonl", "client", "therapist"),
    "EmpatheticDialogues": ("empathetic_dialogues_train.jsonl", "speaker", "listener"),
    "ESConv": ("esconv_train.jsonl", "seeker", "supporter"),
}
Figures = dict[str, dict[str, float]]  # row -> column -> figure

CARD = """# Fluency of {model}

The objective `likelihood` under this language model, measured by `reward_models/fluency/measure.py`, seed {seed},
{seconds:.0f} s. Median perplexity of PAIR's validation reflections: {perplexity:.1f}, the floor of the last column.
Best fixed responses: {fixed}.

{tables}
"""


def read_responses(folder: Path, seed: int) -> dict[str, list[Pair]]:
    """Real responses by source: all of PAIR's validation reflections, a sample of the others."""
    found = {"PAIR validation": reflections(read_rows(folder / "pair_valid.jsonl", ["prompt", *REFLECTIONS]))}
    answers = read_rows(folder / "counselchat_train.jsonl", ["question", "answer"])
    found["CounselChat"] = [_pair(row["question"], row["answer"]) for row in answers]
    for source, (name, asker, answerer) in DIALOGUES.items():
        turns = [row["turns"] for row in read_rows(folder / name, ["turns"])]
        found[source] = [
            _pair(before["text"], turn["text"])
            for dialogue in turns
            for before, turn in pairwise(dialogue)
            if before["role"] == asker and turn["role"] == answerer
        ]
    rng = random.Random(seed)
    fitting = {
        source: [p for p in pairs if len(p.prompt.split()) + len(p.response.split()) <= LONGEST]
        for source, pairs in found.items()
    }
    return {source: rng.sample(pairs, min(SAMPLE, len(pairs))) for source, pairs in fitting.items()}


def reflections(rows: Sequence[dict[str, Any]]) -> list[Pair]:
    return [_pair(row["prompt"], response) for row in rows for field in REFLECTIONS for response in row[field]]


def _pair(prompt: str, response: str) -> Pair:
    return Pair(prompt, response, target=1.0, kind="real", group=prompt)


def word_shuffled(pairs: Sequence[Pair], rng: random.Random) -> list[tuple[Pair, Pair]]:
    """(response, its words in random order) where these are not equal."""
    copies = [(pair, replace(pair, response=word_salad(pair, rng), target=0.0, kind="shuffled")) for pair in pairs]
    return [(pair, copy) for pair, copy in copies if pair.response.split() != copy.response.split()]


def separation(score: Score, copies: Sequence[tuple[Pair, Pair]]) -> dict[int, tuple[float, float]]:
    """By least number of words: share of responses that score more than their copy, ties lost; AUC over all."""
    real, shuffled = (pair_scores(score, side) for side in zip(*copies, strict=True))
    scored = [(len(pair.response.split()), a, b) for (pair, _), a, b in zip(copies, real, shuffled, strict=True)]
    figures = {}
    for shortest in (2, SHORTEST):
        kept = [(a, b) for words, a, b in scored if words >= shortest]
        figures[shortest] = sum(a > b for a, b in kept) / len(kept), auc([a for a, _ in kept], [b for _, b in kept])
    return figures


def attack_scores(score: Score, good: Sequence[Pair], seed: int) -> dict[str, float]:
    """Median of the good responses, then mean scores of what deserves less."""
    rng = random.Random(seed)
    prompts = [pair.prompt for pair in good]
    attacks = {name: [corrupt(pair, rng) for pair in good] for name, corrupt in CORRUPTIONS.items()}
    attacks["prompt verbatim"] = prompts
    attacks["last three words missing"] = [" ".join(pair.response.split()[:-3]) for pair in good]
    attacks["one word of it, 8 times"] = [" ".join([rng.choice(pair.response.split())] * 8) for pair in good]
    attacks |= {f'"{text}"': [text] * len(good) for text in ("...", "?!", "I am I am I am I am", "Yes.", "I see.")}
    table = {"real response (median)": statistics.median(pair_scores(score, good))}
    return table | {name: statistics.fmean(score(prompts, texts)) for name, texts in attacks.items()}


def measure(model: str, folder: Path, seed: int) -> dict[str, Any]:
    """All figures, each under four scales; the median perplexity that is the floor of the last."""
    responses = read_responses(folder, seed)
    good = responses["PAIR validation"]
    others = reflections(read_rows(folder / "pair_train.jsonl", ["prompt", *REFLECTIONS]))
    fixed = [pair.response for pair in random.Random(seed).sample(others, min(CANDIDATES, len(others)))]
    plain = Likelihood(model)
    nlls = [plain.negative_log_likelihoods([(pair.prompt, pair.response)])[0] for pair in good]
    perplexity = math.exp(statistics.median(nlls))
    scales: dict[str, dict[str, Any]] = {
        "paper": {"scale": "paper"},
        "linear": {"scale": "linear"},
        "inverse": {"scale": "inverse", "temperature": 2.0},
        "inverse, floor": {"scale": "inverse", "temperature": 2.0, "floor": perplexity},
    }
    ordered, ranked, attacks, best = Figures(), Figures(), Figures(), {}
    for scale, options in scales.items():
        score = Likelihood(model, **options)
        for source, pairs in responses.items():
            for shortest, figures in separation(score, word_shuffled(pairs, random.Random(seed))).items():
                label = f"{source}, {shortest} words or more"
                ordered.setdefault(label, {})[scale], ranked.setdefault(label, {})[scale] = figures
        best[scale], mean = best_fixed_response(score, [p.prompt for p in good], [*GENERIC_RESPONSES, *fixed], seed)
        for name, value in (attack_scores(score, good, seed) | {"best fixed response": mean}).items():
            attacks.setdefault(name, {})[scale] = value
    return {
        "perplexity": perplexity,
        "scored above its shuffled copy": ordered,
        "AUC over shuffled copies": ranked,
        "mean score": attacks,
        "best fixed response": best,
    }


def markdown_tables(result: dict[str, Any]) -> str:
    """One table per kind of figure."""
    parts = []
    for title in ("scored above its shuffled copy", "AUC over shuffled copies", "mean score"):
        figures: Figures = result[title]
        columns = list(next(iter(figures.values())))
        parts += [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        parts += [f"| {row} | " + " | ".join(f"{figures[row][c]:.3f}" for c in columns) + " |" for row in figures] + [""]
    return "\n".join(parts[:-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, saves; 2 for a mistake in the call, with one line that says which."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the JSON-lines files")
    parser.add_argument("--model", required=True, metavar="PATH_OR_HUB_ID", help="e.g. openai-community/gpt2")
    parser.add_argument("--output", type=Path, metavar="DIR", help="a new folder for metrics.json and the model card")
    parser.add_argument("--seed", type=int, default=0, help="of samples and shuffles (default 0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args(argv)
    try:
        if arguments.output and arguments.output.exists():
            raise ValueError(f"{arguments.output} is there already; give a new --output")
        started = time.monotonic()
        facts = {"model": arguments.model, "seed": arguments.seed}
        result = facts | measure(arguments.model, arguments.data, arguments.seed)
        result["seconds"] = time.monotonic() - started
        tables = markdown_tables(result)
        if arguments.output:
            _save(arguments.output, result, tables)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if arguments.json else tables)
    return 0


def _save(output: Path, result: dict[str, Any], tables: str) -> None:
    fixed = "; ".join(f"{scale}: {text}" for scale, text in result["best fixed response"].items())
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".measuring-") as scratch:
        folder = Path(scratch) / output.name
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(CARD.format(tables=tables, fixed=fixed, **result), encoding="utf-8")
        os.replace(folder, output)


if __name__ == "__main__":
    sys.exit(main())
