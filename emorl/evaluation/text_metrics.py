"""Metrics of completions that no objective sees: diversity, length, repetition, distance from the prompt.

`diversity_2` and `edit_rate` are EMORL's (arXiv 2505.02579, the authors' test metrics); its perplexity is in
perplexity.py. Departure: the authors' word tokens are nltk's, which downloads a sentence splitter; see `word_tokens`.
"""

import itertools
import re
import statistics
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from emorl.objectives.rules.text import Repetition, ngrams

_CLITIC = r"'(?:s|re|ve|ll|d|m)(?!\w|-(?!-))"
_NEGATION = r"n't(?!\w|-(?!-))"
_TOKEN = re.compile(
    rf"""(?:can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b))
      | {_NEGATION} | {_CLITIC}
      | \.{{2,}} | --+
      | (?:[^\s\[\](){{}}<>"“”,;:?!@#$%&'.…—-] | -(?!-) | [.'](?=\w) | [,:](?=\d))+?
        (?={_NEGATION} | {_CLITIC} | [\s\[\](){{}}<>"“”;?!@#$%&…—] | [,:](?!\d) | [.'](?!\w) | -- | $)
      | \S""",
    re.VERBOSE | re.IGNORECASE,
)


def word_tokens(text: str) -> list[str]:
    """Words, punctuation and clitics apart, by the Treebank rules of nltk's `word_tokenize`.

    Differs from nltk in that every full stop before a space ends a sentence (`Dr.` gives two tokens), ’ is ', and quotation
    marks stay as they are. On 21,000 counselling texts 98 % have the same tokens as nltk's rules give sentence by sentence.

    >>> word_tokens("I can't sleep, you know.")
    ['I', 'ca', "n't", 'sleep', ',', 'you', 'know', '.']
    """
    return _TOKEN.findall(text.replace("’", "'"))


def distinct_share(completions: Sequence[str]) -> float:
    """Distinct completions / completions, over different prompts, ignoring case and spacing; in (0, 1].

    A policy that answers every prompt with one sentence scores 1 / len(completions).
    """
    return len({" ".join(completion.lower().split()) for completion in completions}) / len(completions)


def distinct_2(completions: Sequence[str]) -> float:
    """Distinct word bigrams / word bigrams over all completions together; 0 where there are none.

    Sees one sentence said to everyone, which `diversity_2` does not.
    """
    bigrams = [bigram for completion in completions for bigram in ngrams(completion, 2)]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def diversity_2(completions: Sequence[str]) -> float:
    """EMORL's diversity-2: per completion distinct bigrams / number of words (0 without words), then the mean; in [0, 1).

    Sees repetition inside a completion only: it does not fall where all completions are the same. Words are white-space
    separated and keep their case. n words without repetition score (n - 1) / n, so long completions score higher.
    """
    return statistics.fmean(_diversity_2(completion.split()) for completion in completions)


def _diversity_2(words: Sequence[str]) -> float:
    return len(set(itertools.pairwise(words))) / len(words) if words else 0.0


def edit_rate(prompts: Sequence[str], completions: Sequence[str]) -> float:
    """EMORL's edit rate: word Levenshtein distance of prompt and completion / the longer one's length, then the mean.

    In [0, 1]: 0 repeats the prompt word for word, 1 shares no word in the same order; 0 for two empty texts.
    """
    pairs = zip(map(word_tokens, prompts), map(word_tokens, completions), strict=True)
    return statistics.fmean(Levenshtein.normalized_distance(prompt, completion) for prompt, completion in pairs)


def repeated_trigrams(completions: Sequence[str]) -> float:
    """Mean share of word trigrams that repeat an earlier one of the same completion; in [0, 1), higher is worse."""
    return 1 - statistics.fmean(Repetition(n=3)(completions, completions))


def mean_words(completions: Sequence[str]) -> float:
    """Mean number of white-space separated words."""
    return statistics.fmean(_lengths(completions))


def words_deviation(completions: Sequence[str]) -> float:
    """Standard deviation of the number of white-space separated words."""
    return statistics.pstdev(_lengths(completions))


def _lengths(completions: Sequence[str]) -> list[int]:
    return [len(completion.split()) for completion in completions]
