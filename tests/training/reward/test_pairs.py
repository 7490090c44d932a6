"""Pairs that people made, as a reward model learns from them."""

import json
import re
from pathlib import Path

import pytest

from emorl.cli import main
from emorl.config import UserError
from emorl.config.experiment import BaseConfig, DataConfig, Experiment, ObjectiveConfig
from emorl.config.reward import RefreshExperiment, RewardDataConfig, RewardExperiment, load_reward_experiment
from emorl.objectives.models.classifier import Classifier
from emorl.runs.results import RewardResult, read_result
from emorl.stages.train_reward import train_reward
from emorl.training.reward.data import Graded, GradedData, compared, load_graded

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL 1.16 uses names that transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
KIND, RUDE = "you are kind", "you are rude"
TRAINING = {"learning_rate": 5e-3, "num_train_epochs": 12, "per_device_train_batch_size": 8, "bf16": False}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def rows(count=24):
    """Easy pairs: one word says which answer is better; two pairs to each prompt."""
    return [
        {"prompt": f"ask about thing{i // 2}", "chosen": f"{KIND} {end}", "rejected": f"{RUDE} {end}"}
        for i in range(count)
        for end in [("so", "very")[i % 2]]
    ]


def answers(row, form):
    """The row as it is written in one of TRL's formats."""
    prompt, chosen, rejected = row.values()
    return {
        "texts": row,
        "turns": {"prompt": [user(prompt)], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]},
        "turns, answers as texts": {"prompt": [user(prompt)], "chosen": chosen, "rejected": rejected},
        "text, answers as turns": {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]},
        "whole": {"chosen": [user(prompt), assistant(chosen)], "rejected": [user(prompt), assistant(rejected)]},
        "whole, prompt repeated as text": {
            "prompt": prompt,
            "chosen": [user(prompt), assistant(chosen)],
            "rejected": [user(prompt), assistant(rejected)],
        },
        "whole, system and a talk before": {
            side: [{"role": "system", "content": "Be brief."}, assistant("Hello!"), user(prompt), assistant(answer)]
            for side, answer in (("chosen", chosen), ("rejected", rejected))
        },
        "whole, with keys of other tools": {
            side: [{**user(prompt), "id": side}, {**assistant(answer), "weight": 1.0}]
            for side, answer in (("chosen", chosen), ("rejected", rejected))
        },
    }[form]


FORMS = (
    "texts",
    "turns",
    "turns, answers as texts",
    "text, answers as turns",
    "whole",
    "whole, prompt repeated as text",
    "whole, system and a talk before",
    "whole, with keys of other tools",
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, save_word_encoder):
    words = ["you", "are", "kind", "rude", "so", "very", "ask", "about", *(f"thing{i}" for i in range(12))]
    return save_word_encoder(tmp_path_factory.mktemp("encoder"), words)


@pytest.fixture
def make(tmp_path, encoder):
    def experiment(table, model=encoder, data=None, **options):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
        columns = {"chosen_column": "chosen", "rejected_column": "rejected", "validation": 0.25, **(data or {})}
        settings = {"output": tmp_path / "out", "training": TRAINING, "max_tokens": 32, "patience": 20, **options}
        return RewardExperiment(model=model, data=RewardDataConfig(path=str(path), **columns), loss="ranking", **settings)

    return experiment


def everything(data):
    return sorted((row.prompt, row.response, row.targets) for row in [*data.training, *data.validation])


@pytest.mark.parametrize("form", FORMS)
def test_every_format_of_trl_gives_the_same_rows(make, form):
    expected = [
        (row["prompt"], row[side], (target,)) for row in rows() for side, target in (("chosen", 1.0), ("rejected", 0.0))
    ]
    data = load_graded(make([answers(row, form) for row in rows()]))
    assert everything(data) == sorted(expected)


def test_a_whole_text_is_cut_where_the_answers_begin_to_differ(make):
    table = [
        {side: f"Human: thing{i}\n\nAssistant: {answer}" for side, answer in (("chosen", "Yes."), ("rejected", "No."))}
        for i in range(4)
    ]
    data = load_graded(make(table))
    assert everything(data)[:2] == [
        ("Human: thing0\n\nAssistant:", " No.", (0.0,)),
        ("Human: thing0\n\nAssistant:", " Yes.", (1.0,)),
    ]


@pytest.mark.parametrize("form", ["texts", "whole", "whole text", "answers alone"])
def test_pairs_of_one_prompt_are_on_one_side_and_a_pair_is_compared_with_itself_alone(make, form):
    table = [{**row, "chosen": f"{row['chosen']} {i % 3}"} for i in range(3) for row in rows()]
    options = {"prompt_column": None} if form == "answers alone" else {}
    if form == "whole text":  # answers that begin alike, each pair in another way
        starts = ("I", "I am", "It", "")
        table = [
            {side: f"{row['prompt']}\n\nA: {starts[n % 4]} {row[side][8:]}" for side in ("chosen", "rejected")}
            for n, row in enumerate(table)
        ]
    elif form != "texts":
        table = [answers(row, "whole") for row in table]
    data = load_graded(make(table, data=options))
    asked = [{row.part for row in side} for side in (data.training, data.validation)]
    assert not asked[0] & asked[1]
    assert (len(asked[0]), len(asked[1])) == (9, 3)
    assert all((row.prompt is None) == (form == "answers alone") for row in data.training)
    lists = compared(data.training, 16, seed=0)
    assert len(lists) == len(data.training) / 2 == 54
    assert all(sorted(row.targets for row in pair) == [(0.0,), (1.0,)] for pair in lists)


def test_a_validation_file_takes_its_prompts_out_of_training(make, tmp_path):
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(4)))
    data = load_graded(make(rows(), data={"validation_path": str(tmp_path / "held.jsonl")}))
    assert len(data.validation) == 8
    assert len(data.training) == 48 - 8
    assert not {row.group for row in data.training} & {row.group for row in data.validation}


def test_pairs_of_two_equal_texts_are_left_out_with_a_count(make, caplog):
    same = [{"prompt": "ask", "chosen": text, "rejected": f" {text}\n"} for text in ("so", "very", "")]
    assert len(everything(load_graded(make([*rows(), *same])))) == 48
    assert "3 of 27 pairs have two equal texts and were left out" in caplog.text


def test_an_empty_answer_may_be_the_worse_one(make):
    table = [{**row, "rejected": ""} for row in rows()]
    assert ("ask about thing0", "", (0.0,)) in everything(load_graded(make(table)))


@pytest.mark.parametrize("form", ["texts", "whole"])
def test_it_learns_which_answer_people_chose(make, form):
    experiment = make([answers(row, form) for row in rows()])
    train_reward(experiment)
    figures = read_result(RewardResult, experiment.output).figures
    assert figures["pairs in order, same group"] == 1.0
    assert figures["calibration error"] < 0.1
    better, worse = Classifier(str(experiment.output / "model"))(["ask about thing3"] * 2, [KIND, RUDE])
    assert better > 0.8 > 0.2 > worse
    card = (experiment.output / "model" / "README.md").read_text()
    assert "Trained with the ranking loss on pairs." in card
    assert "| pairs in order, same group | 1.000 |" in card


def test_a_decoder_learns_pairs_by_the_margin_alone(make, tiny_base_dir):
    experiment = make(rows(), model=str(tiny_base_dir), pointwise=0.0, max_tokens=96)
    train_reward(experiment)
    assert read_result(RewardResult, experiment.output).figures["pairs in order, same group"] == 1.0


def changed(**cells):
    """The pairs, with the second row changed; a key of None is taken away from all rows."""
    table = [{key: value for key, value in row.items() if key not in cells or cells[key] is not None} for row in rows()]
    table[1].update({key: value for key, value in cells.items() if value is not None})
    return table


@pytest.mark.parametrize(
    ("table", "data", "message"),
    [
        (rows(), {"chosen_column": "better"}, r"pairs.jsonl has no column 'better'; "),
        (rows(), {"rejected_column": "reject"}, r"no column 'reject'; did you mean 'rejected'"),
        (rows(), {"prompt_column": "promt"}, r"no column 'promt'; did you mean 'prompt'"),
        ([*rows(), {**rows()[0], "chosen": None}], {}, r"row 25: 'chosen' is None; expected a text or a list of role/content"),
        ([{**row, "chosen": 3} for row in rows()], {}, r"row 1: 'chosen' is 3; expected a text or"),
        ([{**row, "rejected": ["rude"]} for row in rows()], {}, r"row 1: 'rejected' is \['rude'\]; expected a text or"),
        ([{**row, "rejected": [{"from": "gpt", "value": "no"}]} for row in rows()], {}, r"row 1: 'rejected' is \[\{'from'"),
        ([{**row, "rejected": [{"role": "assistant", "content": None}]} for row in rows()], {}, "row 1: 'rejected' is"),
        ([{**row, "prompt": None} for row in rows()], {}, r"row 1: 'prompt' is None; expected a text or"),
        (changed(prompt=" "), {}, r"row 2: the prompt says nothing"),
        ([{**row, "prompt": [assistant("Hello!")]} for row in rows()], {}, r"row 1: the prompt says nothing"),
        ([{**row, "rejected": [assistant("no")]} for row in rows()], {}, r"row 1: one answer is a text, the other a list"),
        (
            [{**answers(row, "turns"), "rejected": [assistant("no"), user("why?")]} for row in rows()],
            {},
            r"row 1: expected turns of the assistant behind the prompt, got \[\{'role': 'assistant'",
        ),
        ([{**answers(row, "turns"), "chosen": []} for row in rows()], {}, r"row 1: expected turns of the assistant"),
        ([{"chosen": f"{i} yes", "rejected": f"- {i} no"} for i in range(9)], {}, r"row 1: the answers begin differently"),
        ([{"chosen": "yes", "rejected": ""}] * 9, {}, r"row 1: the answers begin differently"),
        ([{"chosen": [assistant("yes")], "rejected": [assistant("no")]}] * 9, {}, r"row 1: the answers begin differently"),
        ([{**row, "rejected": row["chosen"]} for row in rows()], {}, r"'chosen' and 'rejected' are equal in all rows"),
        (rows(2), {}, r"all rows are of one prompt or data.group_column; validation needs others"),
    ],
)
def test_wrong_pairs_are_one_line_before_the_model_loads(make, table, data, message):
    with pytest.raises(UserError, match=message) as error:
        train_reward(make(table, model="/nowhere", data=data))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.rejected_column=null"], "data.chosen_column, data.rejected_column: expected two columns, or neither"),
        (["data.rejected_column=chosen"], "data.chosen_column, data.rejected_column: expected two columns, or neither"),
        (["loss=regression"], r"loss: pairs \(data.chosen_column\) are learnt by ranking, got regression"),
        (["loss=classification"], "loss: pairs .* got classification"),
        (["data.labels=[grade]"], "data.labels is of graded responses, data.chosen_column of pairs"),
        (["data.response_column=answer"], "data.response_column is of graded responses"),
        (["data.label_range=[0, 2]"], "data.label_range is of graded responses"),
        (["data.group_column=group"], "data.group_column is of graded responses"),
        (["data.choosen_column=a"], "data.choosen_column.*chosen_column"),
    ],
)
def test_keys_of_graded_responses_are_refused_beside_pairs(tmp_path, overrides, message, capsys):
    (tmp_path / "reward.yaml").write_text(
        "{output: out, model: m, loss: ranking, data: {path: p.csv, chosen_column: chosen, rejected_column: rejected}}"
    )
    assert load_reward_experiment(tmp_path / "reward.yaml").data.chosen_column == "chosen"
    assert main(["train-reward", str(tmp_path / "reward.yaml"), *overrides]) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(message, error), error
    assert len(error.splitlines()) == 1


def test_a_refresh_refuses_pairs(make):
    policy = Experiment(
        output=Path("x"),
        base=BaseConfig(model="m"),
        data=DataConfig(path="p"),
        objectives={"a": ObjectiveConfig(function="classifier")},
    )
    with pytest.raises(ValueError, match="a refresh adds graded rows; give graded responses instead of pairs"):
        RefreshExperiment(reward=make(rows()), policy=policy)


def test_finished_runs_of_graded_responses_keep_their_fingerprint():
    row = Graded("a", "b", (1.0,), "g", part="p")
    assert repr(row) == "Graded(prompt='a', response='b', targets=(1.0,), group='g')"
    assert GradedData(["x"], [row], []).fingerprint() == "894438e68ab6b3fe"
