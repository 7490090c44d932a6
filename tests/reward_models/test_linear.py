"""The linear reward model, and empathy's mechanisms and their combination."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from emorl.objectives.models.similarity import SentenceEncoder
from reward_models.empathy.objective import combined
from reward_models.linear import LinearModel, fit

PROMPTS = [f"my {thing} hurts" for thing in ("knee", "head", "back", "arm")] * 3
WARM = ["so sorry about it", "sorry to hear that", "I am sorry for you", "oh so sorry friend"]
COLD = ["take a pill then", "see a doctor then", "go to bed then", "do not run then"]
ASKING = ["why does it hurt ?", "why did it start ?", "why is it so ?", "why not rest ?"]
RESPONSES = [*WARM, *COLD, *ASKING]
TARGETS = np.array([[1.0, 0.0]] * 4 + [[0.0, 0.0]] * 4 + [[0.0, 0.5]] * 4)  # sorry; asking, half


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, save_word_encoder) -> str:
    words = sorted({word for text in PROMPTS + RESPONSES for word in text.split()})
    return save_word_encoder(tmp_path_factory.mktemp("encoder"), words)


def test_words_decide_and_graded_targets_stay_graded(encoder: str, tmp_path: Path) -> None:
    scores = fit(tmp_path, encoder, PROMPTS, RESPONSES, TARGETS, strength=100.0)(PROMPTS, RESPONSES).sigmoid()
    assert scores.shape == (12, 2)
    assert scores[:4, 0].min() > 0.8
    assert scores[4:, 0].max() < 0.2
    assert scores[8:, 1].numpy() == pytest.approx([0.5] * 4, abs=0.15)
    assert scores[:8, 1].max() < 0.2


def test_a_saved_model_scores_as_scikit_learn_does(encoder: str, tmp_path: Path) -> None:
    fit(tmp_path, encoder, PROMPTS, RESPONSES, TARGETS)
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    counted = words.fit_transform(RESPONSES).toarray()
    encode = SentenceEncoder(encoder)
    asked, said = encode(PROMPTS).numpy(), encode(RESPONSES).numpy()
    features = np.hstack([counted, said, asked, said * asked])
    model = LogisticRegression(max_iter=2000).fit(features, TARGETS[:, 0])
    found = LinearModel(tmp_path)(PROMPTS, RESPONSES)
    assert found.dtype == torch.float64
    assert found[:, 0].numpy() == pytest.approx(model.decision_function(features), abs=1e-3)
    new = LinearModel(tmp_path)(["my knee hurts"], ["words nobody knows"])
    assert torch.isfinite(new).all()


def test_questions_alone_are_worth_a_quarter_and_two_mechanisms_all() -> None:
    assert combined([0.0, 0.0, 0.0]) == 0.0
    assert combined([0.0, 0.0, 1.0]) == 0.25
    assert combined([1.0, 0.0, 0.0]) == 0.5
    assert combined([1.0, 1.0, 0.0]) == 1.0
    assert combined([1.0, 1.0, 1.0]) == 1.0
