"""A linear reward model: logistic regression over the response's words and the sentence embeddings of prompt and response.

Two thousand labelled pairs teach a cross-encoder less than what single words and their neighbours tell; the two err on
different pairs, so that their mean logit is better than either (`reward_models/empathy/README.md`). It cannot see the order
of words: never use it alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from safetensors.numpy import load_file, save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from emorl.objectives.models.similarity import SentenceEncoder, shared_encoder
from emorl.runs.run import read_json, write_json

WORDS_FILE, WEIGHTS_FILE = "linear.json", "linear.safetensors"


class LinearModel:
    """Logits of a model that `fit` wrote.

    Args:
        folder: where it was written.
        encoder: another place of the sentence encoder than where it was trained.
    """

    def __init__(self, folder: Path, encoder: str | None = None) -> None:
        saved = read_json(folder / WORDS_FILE)
        self._weights = load_file(folder / WEIGHTS_FILE)
        self._words = _vectorizer(vocabulary={word: column for column, word in enumerate(saved["words"])})
        self._words.idf_ = self._weights["idf"]
        self._encode = shared_encoder(encoder or saved["encoder"])

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        """(N, outputs)."""
        features = _features(self._words.transform(responses), self._encode, prompts, responses)
        return torch.from_numpy(features @ self._weights["coefficients"].T + self._weights["offsets"])


def fit(
    folder: Path, encoder: str, prompts: Sequence[str], responses: Sequence[str], targets: np.ndarray, strength: float = 1.0
) -> LinearModel:
    """Fits one logistic regression for each column of `targets` (N, outputs), in [0, 1], and writes it into `folder`.

    Args:
        encoder: folder or hub id of a sentence encoder, which stays as it is.
        strength: inverse of the L2 penalty.
    """
    words = _vectorizer(min_df=2)
    features = _features(words.fit_transform(responses), shared_encoder(encoder), prompts, responses)
    both = scipy.sparse.vstack([features, features])  # a target between 0 and 1 is a weight on both classes
    classes = np.repeat([1, 0], len(responses))
    fitted = [
        LogisticRegression(C=strength, max_iter=2000).fit(both, classes, sample_weight=np.concatenate([target, 1 - target]))
        for target in targets.T
    ]
    weights = {
        "idf": words.idf_,
        "coefficients": np.concatenate([model.coef_ for model in fitted]),
        "offsets": np.concatenate([model.intercept_ for model in fitted]),
    }
    save_file({name: np.ascontiguousarray(values, dtype=np.float64) for name, values in weights.items()}, folder / WEIGHTS_FILE)
    write_json(folder / WORDS_FILE, {"encoder": encoder, "words": words.get_feature_names_out().tolist()})
    return LinearModel(folder)


def _vectorizer(**options: Any) -> Any:
    """TF-IDF of words and pairs of words."""
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, **options)


def _features(counted: Any, encode: SentenceEncoder, prompts: Sequence[str], responses: Sequence[str]) -> Any:
    """(N, words + 3 H), sparse."""
    asked, said = encode(prompts).numpy(), encode(responses).numpy()  # (N, H)
    return scipy.sparse.hstack([counted, np.hstack([said, asked, said * asked])]).tocsr()
