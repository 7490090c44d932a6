"""Pairs, splits and negatives of the reward models; every training command on a tiny random BERT."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from reward_models.agreement import attack_table, best_fixed_response
from reward_models.coherence import train as coherence
from reward_models.command import run
from reward_models.dialogues import SOURCES, responses
from reward_models.empathy import train as empathy
from reward_models.empathy.objective import MECHANISMS, Empathy
from reward_models.guarded import Gate, Guard, Guarded, copied_share, save_gate
from reward_models.pair_data import (
    CORRUPTIONS,
    GENERIC_TARGET,
    Pair,
    comparable,
    corrupted,
    cut,
    generic,
    hold_out,
    hollow,
    mismatched,
    read_negatives,
    read_rows,
    salads,
)
from reward_models.reflection import train as reflection
from reward_models.reflection.objective import Reflection
from reward_models.specificity import train as specificity
from reward_models.specificity.objective import ResponseSpecificity

SHARED = Path(__file__).parents[3] / "shared" / "data"
TOPICS = ["the vaccine", "my knee", "my boss", "wine at night", "the exam", "my sister", "smoking", "the mortgage"]


def pair(topic: str, target: float = 1.0) -> Pair:
    prompt = f"I keep thinking about {topic} and I do not know what to do about it."
    response = f"You are worried that {topic} will take over and you want some peace from it."
    return Pair(prompt, response, target, "complex reflection", prompt)


PAIRS = [pair(topic) for topic in TOPICS]


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory, save_word_encoder) -> str:
    words = sorted({word for p in PAIRS for word in f"{p.prompt} {p.response}".replace(".", " .").split()})
    return save_word_encoder(tmp_path_factory.mktemp("encoder"), words)


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


def test_generic_responses_are_worth_little_and_salads_nothing() -> None:
    assert {p.target for p in generic(PAIRS, 2, random.Random(0))} == {GENERIC_TARGET}
    for made, p in zip(salads(PAIRS, random.Random(0)), PAIRS, strict=True):
        assert made.target == 0.0
        assert sorted(made.response.split()) == sorted(p.response.split())


def test_a_long_pair_keeps_the_end_of_the_prompt_and_the_beginning_of_the_response() -> None:
    short = cut(replace(PAIRS[0], prompt="a b c", response="d e f"), prompt_words=2, response_words=1)
    assert (short.prompt, short.response) == ("b c", "d")


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
    assert [p.target for p in reflection.pair_examples([row])] == [1.0, 0.5, 0.0]
    turns = [
        {"role": "therapist", "text": "Hello.", "behaviour": "other"},
        {"role": "client", "text": "I smoke."},
        {"role": "therapist", "text": "You smoke.", "behaviour": "reflection", "reflection_subtype": "simple"},
        {"role": "therapist", "text": "Why?", "behaviour": "question"},
    ]
    found = reflection.annomi_examples([{"id": "1", "turns": turns}])
    assert [(p.prompt, p.response, p.target) for p in found] == [
        ("I smoke.", "You smoke.", 0.5),
        ("I smoke.", "Why?", 0.0),
    ]


@pytest.mark.parametrize(
    ("levels", "target"), [((0, 0, 0), 0.0), ((1, 0, 0), 0.25), ((0, 2, 2), 0.75), ((2, 2, 0), 1.0), ((2, 2, 2), 1.0)]
)
def test_empathy_targets_are_the_weighted_sum_over_4(levels: tuple[int, int, int], target: float) -> None:
    row = {"seeker": "s", "response": "r", **dict(zip(MECHANISMS, levels, strict=True))}
    assert empathy.epitome_examples([row])[0].target == target


def test_reading_refuses_missing_broken_empty_and_incomplete_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file .*pair\.jsonl: --data must name the folder"):
        read_rows(tmp_path / "pair.jsonl", [])
    for text, message in [("", "holds no rows"), ("{", "line 1 is not JSON"), ('{"a": 1}\n{"b": 1}', "line 2 lacks a")]:
        (tmp_path / "pair.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_rows(tmp_path / "pair.jsonl", ["a"])


@pytest.mark.parametrize("module", [reflection, empathy, coherence, specificity])
def test_a_command_without_its_data_ends_in_one_line_and_code_2(module, tmp_path: Path, capsys) -> None:
    arguments = ["--data", str(tmp_path), "--encoder", "nowhere", "--output", str(tmp_path / "out")]
    assert run(module.main, module.__doc__, arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_best_fixed_response_is_found_and_reported() -> None:
    def score(prompts, responses) -> list[float]:
        return [0.9 if response == "magic" else 0.1 for response in responses]

    assert best_fixed_response(score, ["a", "b"], ["x", "magic", "y"], seed=0) == ("magic", pytest.approx(0.9))
    table = attack_table(score, PAIRS, ["magic"], seed=0)
    assert table["best fixed response: magic"] == pytest.approx(0.9)
    assert table["median of true good responses"] == pytest.approx(0.1)


def test_copied_words_are_counted_in_runs_of_four() -> None:
    assert copied_share("i want to quit smoking now", "I want to quit smoking now") == 1.0
    assert copied_share("i want to quit smoking", "You want to quit it") == 0.0
    assert copied_share("a b c d e", "a b c d x") == pytest.approx(1 / 2)
    assert copied_share("a b c d", "a b") == 0.0


def test_a_gate_counts_in_full_only_after_a_prompt_that_says_something(tiny_encoder: str, tmp_path: Path) -> None:
    save_gate(tmp_path, Gate(tiny_encoder, offset=50.0, full_words=8), [p.prompt for p in PAIRS])  # nothing passes it
    guard = Guard(str(tmp_path))
    scores = guard(["I", "I keep thinking about", "I keep thinking about my knee and do"], ["my boss"] * 3)
    assert scores == pytest.approx([7 / 8, 4 / 8, 0.0], abs=1e-6)
    echo = PAIRS[0].prompt
    assert Guard(str(tmp_path), bank=str(_bank(tmp_path)))([echo], [echo]) == [0.0]


def _bank(folder: Path) -> Path:
    (folder / "other.txt").write_text("You want.\nIt is.\n")
    return folder / "other.txt"


def test_a_folder_without_a_gate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no gate"):
        Guarded(str(tmp_path))
    with pytest.raises(ValueError, match="expected mechanism combined, emotional_reaction"):
        Empathy(str(tmp_path), mechanism="warmth")


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files the commands read, in their format, with our own sentences."""
    folder = tmp_path_factory.mktemp("data")

    def write(name: str, rows: list[dict]) -> None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def graded(p: Pair) -> dict:
        return {
            "prompt": p.prompt,
            "complex_reflections": [p.response],
            "simple_reflections": [p.response.split(" and ")[0]],
            "non_reflections": ["What do you want to do about it ?", "I know what to do about it and you do not ."],
        }

    write("pair_train", [graded(p) for p in PAIRS[:6]])
    write("pair_valid", [graded(p) for p in PAIRS[6:]])
    said = [
        {"role": "therapist", "behaviour": "reflection", "reflection_subtype": "simple"},
        {"role": "therapist", "behaviour": "question"},
    ]
    write(
        "annomi_train",
        [
            {
                "id": str(n),
                "turns": [
                    {"role": "client", "text": f"{p.prompt} {n}"},
                    {**said[0], "text": p.response},
                    {"role": "client", "text": f"{n} {p.prompt}"},
                    {**said[1], "text": "What do you want to do about it ?"},
                ],
            }
            for n, p in enumerate(PAIRS)
        ],
    )
    ratings = [(0, 0, 0), (2, 1, 0), (0, 2, 2), (1, 0, 1)]
    write(
        "epitome_train",
        [
            {"seeker": f"{p.prompt} {n}", "response": p.response, **dict(zip(MECHANISMS, ratings[n % 4], strict=True))}
            for n, p in enumerate(PAIRS * 4)
        ],
    )
    write("counselchat_train", [{"question": f"{p.prompt} ?", "answer": p.response} for p in PAIRS])
    for name, asks, answers in (("esconv", "seeker", "supporter"), ("empathetic_dialogues", "speaker", "listener")):
        turns = [[{"role": asks, "text": f"{p.prompt} {name}"}, {"role": answers, "text": p.response}] for p in PAIRS]
        write(f"{name}_train", [{"turns": both} for both in turns])
    return folder


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # as in tests/training
@pytest.mark.parametrize(
    ("module", "objective"),
    [(reflection, Reflection), (empathy, Empathy), (coherence, Guarded), (specificity, ResponseSpecificity)],
)
def test_a_command_trains_measures_and_its_objective_scores(
    module, objective, tiny_data: Path, tiny_encoder: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("reward_models.command.TRAINING", {"num_train_epochs": 1, "bf16": False})
    monkeypatch.setattr(module, "TRAINING", {"num_train_epochs": 1, "bf16": False}, raising=False)
    arguments = ["--data", str(tiny_data), "--encoder", tiny_encoder, "--output", str(tmp_path / "out")]
    refused = tmp_path / "negatives.jsonl"
    refused.write_text(json.dumps({"prompt": PAIRS[0].prompt, "response": "You are you ."}) + "\n")
    if module is not specificity:
        arguments += ["--negatives", str(refused)]
    assert run(module.main, None, arguments) == 0
    folder = tmp_path / "out" / "model"
    figures = json.loads((folder / "metrics.json").read_text())
    assert any(name.startswith("best fixed response") for name in figures)
    assert "## Measured on data held out by this script" in (folder / "README.md").read_text()
    scorer = objective(str(folder))
    scores = scorer([p.prompt for p in PAIRS], [p.response for p in PAIRS])
    assert all(0 <= score <= 1 for score in scores)
    assert scorer([PAIRS[0].prompt], [""])[0] < 0.5
    if objective is Empathy:
        assert len(Empathy(str(folder), "exploration")(["a"], ["b"])) == 1
    before = (folder / "model.safetensors").stat().st_mtime_ns if objective is not ResponseSpecificity else 0
    assert run(module.main, None, arguments) == 0  # measured again, not trained again
    assert before == 0 or (folder / "model.safetensors").stat().st_mtime_ns == before
    capsys.readouterr()


def test_negatives_of_a_refresh_are_compared_with_the_prompts_own_responses(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "response": "r", "kind": "repeated"}\n')
    [row] = read_negatives([tmp_path / "a.jsonl"])
    assert (row["grade"], row["group"]) == (0.0, "pair p")


@pytest.mark.realdata
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_every_source_of_dialogues_is_read() -> None:
    pairs = responses(SHARED, per_source=5, seed=0)
    assert {p.kind for p in pairs} == set(SOURCES)
    assert len(pairs) == 5 * len(SOURCES)
    assert responses(SHARED, per_source=5, seed=0) == pairs


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
