"""Graded (prompt, response) pairs: reading them, holding some out, and making the negatives a policy will try.

A classifier trained on human responses alone scores form, not content. So some of what it learns from is made here, always
inside one split: a good response under another person's prompt, word salad, hollowed-out and repeated responses, echoes of
the prompt, sentences that fit everyone. What no negative can teach a small encoder, whose words these are, is the gate's.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

GENERIC_TARGET = 0.05

GENERIC_RESPONSES = (
    "You're feeling that you'd feel.",
    "You feel that you feel.",
    "You're feeling like you are feeling.",
    "It sounds like you are feeling that you are feeling.",
    "It sounds like you are feeling a lot.",
    "It sounds like you're going through a lot right now.",
    "It sounds like this is really hard for you.",
    "It sounds like you want things to be different.",
    "It sounds like you have a lot on your mind.",
    "It seems like you are not sure about it.",
    "It seems like you're having a difficult time.",
    "You're feeling overwhelmed.",
    "You're feeling frustrated.",
    "You're worried about that.",
    "You're worried about what would happen.",
    "You want to do what's best for you.",
    "You want to make a change.",
    "You're not sure what to do.",
    "You're trying to do your best.",
    "You've been thinking about this a lot.",
    "You've been through a lot.",
    "You know what you need to do.",
    "You don't want that, and you're feeling it.",
    "You're concerned about it and you're not sure how to do it.",
    "On the one hand you want to change, and on the other hand you don't.",
    "What I'm hearing is that you have some concerns.",
    "I hear you.",
    "I hear what you're saying.",
    "I understand how you feel.",
    "I know how you feel.",
    "I'm sorry to hear that.",
    "I'm so sorry you are going through this.",
    "I'm sorry you feel that way, and I'm here for you.",
    "That must be so hard for you.",
    "That sounds really tough.",
    "That makes sense.",
    "You are not alone.",
    "I feel the same way.",
    "I've been there too.",
    "Things will get better.",
    "Tell me more about that.",
    "How does that make you feel?",
    "Do you want to talk about it?",
    "Thank you for sharing that with me.",
)
STEMS = (
    "You feel",
    "You're feeling",
    "It sounds like",
    "It sounds like you",
    "You want",
    "You're worried about",
    "I'm sorry",
)


@dataclass(frozen=True)
class Pair:
    """One response to one prompt; `target` in [0, 1]; pairs of one `group` (a prompt, a dialogue) are never split."""

    prompt: str
    response: str
    target: float
    kind: str
    group: str

    def __post_init__(self) -> None:
        if not 0.0 <= self.target <= 1.0:
            raise ValueError(f"a target must be in [0, 1], got {self.target} for {self.kind!r}: {self.response[:60]!r}")


def read_rows(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; ValueError when it is missing, empty, broken or lacks one of `fields`."""
    if not path.is_file():
        raise ValueError(f"no file {path}: --data must name the folder that holds {path.name}")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error.msg}") from None
        missing = [field for field in fields if not isinstance(row, dict) or field not in row]
        if missing:
            raise ValueError(f"{path} line {number} lacks {', '.join(missing)}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def comparable(prompt: str) -> str:
    """The prompt as compared between splits: case and outer space do not make it another prompt."""
    return " ".join(prompt.casefold().split())


def hold_out(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs, whole groups on one side.

    Where two groups hold the same prompt ("Yeah." in many dialogues), the training side loses that prompt's pairs.
    """
    groups = sorted({pair.group for pair in pairs})
    if len(groups) < 2:
        raise ValueError(f"at least 2 groups are needed to hold some out, got {len(groups)}")
    random.Random(seed).shuffle(groups)
    chosen = set(groups[: min(len(groups) - 1, max(1, round(share * len(groups))))])
    held_out = [pair for pair in pairs if pair.group in chosen]
    seen = {comparable(pair.prompt) for pair in held_out}
    training = [pair for pair in pairs if pair.group not in chosen and comparable(pair.prompt) not in seen]
    return training, held_out


def mismatched(pairs: Sequence[Pair], per_pair: int, rng: random.Random) -> list[Pair]:
    """Each response under `per_pair` prompts of other groups, target 0; never under a prompt it does answer."""
    answered: dict[str, set[str]] = {}
    for pair in pairs:
        answered.setdefault(comparable(pair.response), set()).add(comparable(pair.prompt))
    prompts = sorted({(pair.prompt, pair.group) for pair in pairs})
    result = []
    for pair in pairs:
        own = answered[comparable(pair.response)]
        others = [(p, g) for p, g in rng.sample(prompts, min(len(prompts), per_pair + 8)) if g != pair.group]
        for prompt, group in [(p, g) for p, g in others if comparable(p) not in own][:per_pair]:
            result.append(replace(pair, prompt=prompt, group=group, target=0.0, kind="mismatched"))
    return result


def salads(pairs: Sequence[Pair], rng: random.Random) -> list[Pair]:
    """Each response's words in random order, target 0."""
    return [replace(pair, response=word_salad(pair, rng), target=0.0, kind="word salad") for pair in pairs]


def cut(pair: Pair, prompt_words: int = 60, response_words: int = 60) -> Pair:
    """The last words of the prompt and the first of the response: what a reward model needs, at half the cost."""
    prompt, response = pair.prompt.split(), pair.response.split()
    return replace(pair, prompt=" ".join(prompt[-prompt_words:]), response=" ".join(response[:response_words]))


def generic(pairs: Sequence[Pair], per_pair: int, rng: random.Random) -> list[Pair]:
    """Sentences that fit everyone, under the prompts of `pairs`."""
    return [
        replace(pair, response=text, target=GENERIC_TARGET, kind="generic")
        for pair in pairs
        for text in rng.sample(GENERIC_RESPONSES, per_pair)
    ]


def word_salad(pair: Pair, rng: random.Random) -> str:
    """The response's own words in random order."""
    words = pair.response.split()
    return " ".join(rng.sample(words, len(words)))


def repeated_phrase(pair: Pair, rng: random.Random) -> str:
    """A phrase of 2 to 4 words of the response, over and over."""
    words = pair.response.split()
    length = rng.randint(2, 4)
    start = rng.randrange(max(1, len(words) - length))
    return " ".join(words[start : start + length] * rng.randint(3, 6))


def first_words(pair: Pair, rng: random.Random) -> str:
    """The response cut after 1 to 3 words."""
    return " ".join(pair.response.split()[: rng.randint(1, 3)])


def nothing(pair: Pair, rng: random.Random) -> str:
    """An empty response."""
    return ""


def prompt_echo(pair: Pair, rng: random.Random) -> str:
    """The prompt verbatim, sometimes behind a reflective stem."""
    return pair.prompt if rng.random() < 0.7 else f"{rng.choice(STEMS)} {pair.prompt}"


def stuffed_stem(pair: Pair, rng: random.Random) -> str:
    """A reflective stem and a random bag of the prompt's words: on topic, says nothing."""
    words = pair.prompt.split()
    return f"{rng.choice(STEMS)} {' '.join(rng.sample(words, min(len(words), rng.randint(3, 10))))}."


CORRUPTIONS: dict[str, Callable[[Pair, random.Random], str]] = {
    "word salad": word_salad,
    "repeated phrase": repeated_phrase,
    "first words": first_words,
    "empty": nothing,
    "prompt echo": prompt_echo,
    "stuffed stem": stuffed_stem,
}


def corrupted(pairs: Sequence[Pair], per_pair: int, rng: random.Random) -> list[Pair]:
    """`per_pair` different corruptions of each pair, target 0."""
    return [
        replace(pair, response=CORRUPTIONS[name](pair, rng), target=0.0, kind=name)
        for pair in pairs
        for name in rng.sample(sorted(CORRUPTIONS), per_pair)
    ]


def hollow(pairs: Sequence[Pair], rng: random.Random, keep: int = 60) -> list[Pair]:
    """Each response reduced to the `keep` words most frequent over all responses: form without content.

    "You're worried that the vaccine may harm you" becomes "You're worried that the may you".
    """
    counts = Counter(word.casefold() for pair in pairs for word in set(pair.response.split()))
    frequent = {word for word, _ in counts.most_common(keep)}
    result = []
    for pair in pairs:
        words = [word for word in pair.response.split() if word.casefold() in frequent]
        if 2 < len(words) < 0.8 * len(pair.response.split()):
            text = " ".join(words[: rng.randint(4, 10)]).rstrip(".,") + "."
            result.append(replace(pair, response=text, target=0.0, kind="hollow"))
    return result


def shuffled(parts: Iterable[Sequence[Pair]], rng: random.Random) -> list[Pair]:
    """All parts as one list in random order."""
    pairs = [pair for part in parts for pair in part]
    rng.shuffle(pairs)
    return pairs


def read_negatives(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows of grade 0, compared with the labelled responses to the same prompt of PAIR."""
    rows = [row for path in paths for row in read_rows(path, ["prompt", "response"])]
    return [
        {"prompt": row["prompt"], "response": row["response"], "grade": 0.0, "group": f"pair {row['prompt']}", "kind": "policy"}
        for row in rows
    ]
