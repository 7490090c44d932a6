"""Diversity of completions: what shows a collapsed policy that rewards do not show."""

from collections.abc import Sequence

from emorl.objectives.text import ngrams


def distinct_share(completions: Sequence[str]) -> float:
    """Distinct completions / completions, over different prompts, ignoring case and spacing; in (0, 1].

    A policy that answers every prompt with one sentence scores 1 / len(completions).
    """
    return len({" ".join(completion.lower().split()) for completion in completions}) / len(completions)


def distinct_2(completions: Sequence[str]) -> float:
    """Distinct word bigrams / word bigrams over all completions together; 0 where there are none."""
    bigrams = [bigram for completion in completions for bigram in ngrams(completion, 2)]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def mean_words(completions: Sequence[str]) -> float:
    """Mean number of white-space separated words."""
    return sum(len(completion.split()) for completion in completions) / len(completions)
