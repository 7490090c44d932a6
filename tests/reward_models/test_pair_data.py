"""Pairs, splits and negatives of the reward models; two training steps on a tiny random BERT."""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from reward_models.agreement import attack_table, auc, best_fixed_response, calibration_error, rank_correlation
from reward_models.command import RewardModel, run
from reward_models.empathy import train as empathy
from reward_models.pair_data import (
    CORRUPTIONS,
    GENERIC_TARGET,
    SPLICED_SHARE,
    Pair,
    comparable,
    corrupted,
    generic,
    hold_out,
    hollow,
    mismatched,
    read_rows,
    spliced,
)
from reward_models.reflection import train as reflection
from reward_models.sentence_pair import HeadTraining, SentencePair, train

SHARED = Path(__file__).parents[3] / "shared" / "data"
TOPICS = ["the vaccine", "my knee", "my boss", "wine at night", "the exam", "my sister", "smoking", "the mortgage"]


def pair(topic: str, target: float = 1.0) -> Pair:
    prompt = f"I keep thinking about {topic} and I do not know what to do about it."
    response = f"You are worried that {topic} will take over and you want some peace from it."
    return Pair(prompt, response, target, "complex reflection", prompt)


PAIRS = [pair(topic) for topic in TOPICS]


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random 1-layer BERT over words, saved like a hub model."""
    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({word for p in PAIRS for word in f"{p.prompt} {p.response}".replace(".", " .").split()})
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(names), max_position_embeddings=128, **sizes)).save_pretrained(folder)
    return str(folder)


def test_no_group_and_no_prompt_is_on_both_sides_of_a_split() -> None:
    said_by_many = [replace(p, prompt="Yeah.", group=p.group) for p in PAIRS]
    training, held_out = hold_out(PAIRS + said_by_many, 0.25, seed=3)
    assert not {p.group for p in training} & {p.group for p in held_out}
    assert not {comparable(p.prompt) for p in training} & {comparable(p.prompt) for p in held_out}
    assert len({p.group for p in held_out}) == 2
    assert "Yeah." in {p.prompt for p in held_out}


def test_a_split_is_the_same_for_the_same_seed_only() -> None:
    assert hold_out(PAIRS, 0.25, seed=1) == hold_out(PAIRS, 0.25, seed=1)
    assert len({str(hold_out(PAIRS, 0.25, seed=s)) for s in range(6)}) > 1


def test_one_group_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="at least 2 groups"):
        hold_out(PAIRS[:1], 0.5, seed=0)


def test_a_mismatched_response_never_meets_a_prompt_it_answers() -> None:
    shared_answer = replace(PAIRS[1], response=PAIRS[0].response.upper())
    pairs = [*PAIRS, shared_answer]
    answered = {(comparable(p.prompt), comparable(p.response)) for p in pairs}
    wrong = mismatched(pairs, 3, random.Random(0))
    assert len(wrong) == 3 * len(pairs)
    assert all(p.target == 0 and p.kind == "mismatched" for p in wrong)
    assert not {(comparable(p.prompt), comparable(p.response)) for p in wrong} & answered
    assert {p.prompt for p in wrong} <= {p.prompt for p in pairs}


def test_the_group_of_a_mismatched_pair_is_the_group_of_its_prompt() -> None:
    assert all(p.group == p.prompt for p in mismatched(PAIRS, 2, random.Random(0)))


@pytest.mark.parametrize("name", sorted(CORRUPTIONS))
def test_a_corruption_changes_the_response(name: str) -> None:
    text = CORRUPTIONS[name](PAIRS[0], random.Random(1))
    assert text != PAIRS[0].response
    assert (text == "") == (name == "empty")


def test_corruptions_are_worth_nothing_and_work_on_one_word() -> None:
    short = replace(PAIRS[0], prompt="No.", response="Never.")
    result = corrupted([short, *PAIRS], len(CORRUPTIONS), random.Random(0))
    assert {p.kind for p in result} == set(CORRUPTIONS)
    assert {p.target for p in result} == {0.0}


def test_partial_and_generic_responses_are_worth_little() -> None:
    assert {p.target for p in generic(PAIRS, 2, random.Random(0))} == {GENERIC_TARGET}
    for p in spliced([replace(p, target=0.6) for p in PAIRS], random.Random(0)):
        assert p.target == pytest.approx(SPLICED_SHARE * 0.6)
        assert p.response.split()[:4] == ["You", "are", "worried", "that"]


def test_a_hollow_response_keeps_only_what_everyone_says() -> None:
    everyone = set(PAIRS[0].response.split()) & set(PAIRS[1].response.split())
    result = hollow(PAIRS, random.Random(0), keep=len(everyone) - 4)
    assert result
    assert all({word.rstrip(".") for word in p.response.split()} <= {w.rstrip(".") for w in everyone} for p in result)
    assert {p.target for p in result} == {0.0}


def test_a_target_outside_0_to_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got 1.5"):
        pair("rain", 1.5)


def test_reflection_targets_follow_the_labels() -> None:
    row = {"prompt": "p", "complex_reflections": ["c"], "simple_reflections": ["s"], "non_reflections": ["n"]}
    assert [p.target for p in reflection.pair_examples([row])] == [1.0, 0.6, 0.0]
    turns = [
        {"role": "therapist", "text": "Hello.", "behaviour": "other"},
        {"role": "client", "text": "I smoke."},
        {"role": "therapist", "text": "You smoke.", "behaviour": "reflection", "reflection_subtype": "simple"},
        {"role": "therapist", "text": "Why?", "behaviour": "question"},
    ]
    found = reflection.annomi_examples([{"id": "1", "turns": turns}])
    assert [(p.prompt, p.response, p.target) for p in found] == [
        ("I smoke.", "You smoke.", 0.6),
        ("I smoke.", "Why?", 0.0),
    ]


@pytest.mark.parametrize(("levels", "target"), [((0, 0, 0), 0.0), ((1, 0, 0), 0.25), ((0, 2, 2), 1.0), ((2, 2, 2), 1.0)])
def test_empathy_targets_are_the_sum_over_4(levels: tuple[int, int, int], target: float) -> None:
    row = {"seeker": "s", "response": "r", **dict(zip(empathy.MECHANISMS, levels, strict=True))}
    assert empathy.epitome_examples([row])[0].target == target


def test_reading_refuses_missing_broken_empty_and_incomplete_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file .*pair\.jsonl: --data must name the folder"):
        read_rows(tmp_path / "pair.jsonl", [])
    for text, message in [("", "holds no rows"), ("{", "line 1 is not JSON"), ('{"a": 1}\n{"b": 1}', "line 2 lacks a")]:
        (tmp_path / "pair.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_rows(tmp_path / "pair.jsonl", ["a"])


@pytest.mark.parametrize("command", [reflection.main, empathy.main])
def test_a_command_without_its_data_ends_in_one_line_and_code_2(command, tmp_path: Path, capsys) -> None:
    arguments = ["--data", str(tmp_path), "--encoder", "nowhere", "--output", str(tmp_path / "out")]
    assert command(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert command([*arguments[:-1], str(Path(__file__).parent)]) == 2
    assert "holds something already" in capsys.readouterr().err


def test_known_areas_under_the_curve_and_correlations() -> None:
    assert auc([2, 3], [0, 1]) == 1.0
    assert auc([1, 1], [1, 1]) == 0.5
    assert auc([3, 0], [1, 2]) == 0.5
    assert rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1.0)
    assert calibration_error([0.25] * 4, [0, 0, 0, 1], bins=1) == 0.0
    with pytest.raises(ValueError, match="scores on both sides"):
        auc([], [1])


def test_the_best_fixed_response_is_found_and_reported() -> None:
    def score(prompts, responses) -> list[float]:
        return [0.9 if response == "magic" else 0.1 for response in responses]

    assert best_fixed_response(score, ["a", "b"], ["x", "magic", "y"], seed=0) == ("magic", pytest.approx(0.9))
    table = attack_table(score, PAIRS, ["magic"], seed=0)
    assert table["best fixed response: magic"] == pytest.approx(0.9)
    assert table["median of true good responses"] == pytest.approx(0.1)


def labelled(seed: int) -> list[Pair]:
    """Responses to the right client are worth 1, to another one 0: a head has to compare."""
    return [*PAIRS * 4, *mismatched(PAIRS, 4, random.Random(seed))]


def test_a_head_learns_who_is_spoken_of_and_is_saved_and_loaded(tiny_encoder: str, tmp_path: Path) -> None:
    settings = HeadTraining(tiny_encoder, epochs=60, patience=60, learning_rate=1e-2)
    model = train(labelled(0), labelled(1), settings, tmp_path / "model")
    right, wrong = PAIRS, mismatched(PAIRS, 4, random.Random(2))

    def scores(pairs: list[Pair], by: SentencePair = model) -> list[float]:
        return by([p.prompt for p in pairs], [p.response for p in pairs])

    assert auc(scores(right), scores(wrong)) > 0.9
    assert all(0 <= score <= 1 for score in scores([*right, *wrong]))
    loaded = SentencePair(str(tmp_path / "model"), batch_size=3)
    assert scores(right, loaded) == pytest.approx(scores(right), abs=1e-6)
    chat = [[{"role": "user", "content": p.prompt}] for p in right]
    answers = [[{"role": "assistant", "content": p.response}] for p in right]
    assert loaded(chat, answers) == pytest.approx(scores(right), abs=1e-6)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"head.safetensors", "config.json"}


def test_the_same_seed_gives_the_same_head(tiny_encoder: str, tmp_path: Path) -> None:
    settings = HeadTraining(tiny_encoder, epochs=2)
    one, other = (train(labelled(0), labelled(1), settings, tmp_path / name) for name in ("one", "other"))
    prompts, responses = [p.prompt for p in PAIRS], [p.response for p in PAIRS]
    assert one(prompts, responses) == other(prompts, responses)


def test_calibration_is_folded_into_the_last_layer(tiny_encoder: str, tmp_path: Path) -> None:
    """On the pairs it is calibrated on, mean score and mean target agree (the offset's optimum)."""
    model = train(labelled(0), labelled(1), HeadTraining(tiny_encoder, epochs=3), tmp_path / "model")
    scores = model([p.prompt for p in labelled(1)], [p.response for p in labelled(1)])
    assert sum(scores) / len(scores) == pytest.approx(sum(p.target for p in labelled(1)) / len(scores), abs=0.01)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no reward model"):
        SentencePair(str(tmp_path))


def test_a_command_saves_model_card_and_figures_together(tiny_encoder: str, tmp_path: Path, capsys) -> None:
    def measure(score: object, data: object, seed: int) -> dict[str, float]:
        return {"AUC": 0.5}

    data = SimpleNamespace(training=PAIRS[:5], stopping=PAIRS[5:])
    model = RewardModel(lambda folder, seed: data, lambda pairs, seed: list(pairs), measure, "# card\n{figures}\n")
    arguments = ["--data", ".", "--encoder", tiny_encoder, "--output", str(tmp_path / "out")]
    assert run(model, None, arguments) == 0
    assert "AUC | 0.500" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["AUC"] == 0.5
    assert run(model, None, arguments) == 2
    assert "holds something already; give a new --output" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.realdata
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_no_client_prompt_is_in_two_parts_of_the_real_data() -> None:
    data = reflection.read_data(SHARED, seed=0)
    parts = [data.training, data.stopping, data.pair_test, data.annomi_test]
    prompts = [{comparable(p.prompt) for p in part} for part in parts]
    assert all(not a & b for i, a in enumerate(prompts) for b in prompts[i + 1 :])
    posts = empathy.read_data(SHARED, seed=0)
    seen = [{comparable(p.prompt) for p in part} for part in (posts.training, posts.stopping, posts.test)]
    assert all(not a & b for i, a in enumerate(seen) for b in seen[i + 1 :])
