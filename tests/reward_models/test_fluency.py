"""Measuring a language model as a fluency judge."""

import json
import random
from pathlib import Path

import pytest

from emorl.objectives.models.likelihood import Likelihood
from reward_models.fluency.measure import SHORTEST, attack_scores, main, read_responses, separation, word_shuffled
from reward_models.pair_data import Pair

SHARED = Path(__file__).parents[3] / "shared"
PAIRS = [Pair("p", text, 1.0, "real", "p") for text in ("a b c d e f g", "h i j k l m", "one", "same same", "x y", "1 2 3 4 5")]


def in_order(prompts, responses):
    """1 for words in alphabetical order."""
    return [float(text.split() == sorted(text.split())) for text in responses]


def test_copies_hold_the_same_words_in_another_order():
    copies = word_shuffled(PAIRS * 5, random.Random(0))
    assert {pair.response for pair, _ in copies} <= {pair.response for pair in PAIRS} - {"one", "same same"}
    assert all(sorted(a.response.split()) == sorted(b.response.split()) and a.response != b.response for a, b in copies)


def test_separation_of_a_perfect_and_of_a_blind_judge():
    copies = word_shuffled(PAIRS, random.Random(0))
    assert set(separation(in_order, copies).values()) == {(1.0, 1.0)}
    assert separation(lambda p, r: [0.5] * len(r), copies)[SHORTEST] == (0.0, 0.5)  # ties are lost


def test_attacks_are_scored_beside_the_median():
    table = attack_scores(lambda p, r: [len(text.split()) / 100 for text in r], PAIRS, seed=0)
    assert table["real response (median)"] == pytest.approx(0.035)
    assert table["empty"] == 0.0
    assert table["one word of it, 8 times"] == pytest.approx(0.08)
    assert table["prompt verbatim"] == pytest.approx(0.01)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    reflection = {"prompt": "I am sad.", "complex_reflections": ["You feel sad about it all."], "simple_reflections": ["Sad."]}
    turns = {"client": "therapist", "speaker": "listener", "seeker": "supporter"}
    rows = {"pair_train": reflection, "pair_valid": reflection}
    rows["counselchat_train"] = {"question": "What can I do?", "answer": "You can sleep more and work less."}
    for name, (asker, answerer) in zip(("annomi", "empathetic_dialogues", "esconv"), turns.items(), strict=True):
        rows[f"{name}_train"] = {
            "turns": [{"role": asker, "text": "I am sad."}, {"role": answerer, "text": "It is hard to be so sad."}]
        }
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_one_command_measures_and_saves_whole_or_not_at_all(data, tmp_path, tiny_base_dir, capsys):
    command = ["--data", str(data), "--model", str(tiny_base_dir), "--output", str(tmp_path / "out")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(result["mean score"]["empty"].values())[1:] == [0.0, 0.0, 0.0]
    assert "| mean score | paper | linear | inverse | inverse, floor |" in printed
    assert printed.strip() in (tmp_path / "out" / "README.md").read_text()
    assert main(command) == 2
    assert "is there already; give a new --output" in capsys.readouterr().err
    (data / "pair_valid.jsonl").unlink()
    assert main([*command[:4]]) == 2
    assert "pair_valid.jsonl" in capsys.readouterr().err


@pytest.mark.realdata
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
def test_real_responses_score_above_their_shuffled_copies():
    score = Likelihood(str(SHARED / "models" / "counsel-3m"), temperature=2.0)
    copies = word_shuffled(read_responses(SHARED / "data", seed=0)["PAIR validation"], random.Random(0))
    ordered, area = separation(score, copies)[SHORTEST]
    assert min(ordered, area) >= 0.99
