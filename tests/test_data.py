import json

import pandas as pd
import pytest

from emorl.config import UserError
from emorl.config.experiment import DataConfig
from emorl.data import load_prompts
from emorl.policies.conversation import prompt_text


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "p.jsonl", [{"prompt": f"I feel {i}.", "topic": f"t{i}"} for i in range(20)])


def texts(split):
    return [prompt_text(prompt) for prompt in split["prompt"]]


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet"])
def test_every_local_format_is_read(tmp_path, ending):
    frame = pd.DataFrame({"question": [f"q{i}" for i in range(10)]})
    path = tmp_path / f"p.{ending}"
    {
        "csv": lambda: frame.to_csv(path, index=False),
        "json": lambda: frame.to_json(path, orient="records"),
        "jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        "parquet": lambda: frame.to_parquet(path),
    }[ending]()
    splits = load_prompts(DataConfig(path=str(path), prompt_column="question", validation=2, test=3), 0, False)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (5, 2, 3)


def test_splits_share_no_prompt_and_lose_none(prompts):
    splits = load_prompts(DataConfig(path=prompts, validation=4, test=5), 0, True)
    parts = [set(texts(part)) for part in (splits.train, splits.validation, splits.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 20


def test_the_same_seed_gives_the_same_splits_and_another_one_others(prompts):
    config = DataConfig(path=prompts, validation=4, test=5)
    assert texts(load_prompts(config, 1, True).test) == texts(load_prompts(config, 1, True).test)
    assert texts(load_prompts(config, 1, True).test) != texts(load_prompts(config, 2, True).test)


def test_prompts_become_conversations_and_columns_stay_with_their_prompt(prompts):
    config = DataConfig(path=prompts, validation=4, test=5, system_prompt="Listen.")
    row = load_prompts(config, 0, True).train[0]
    assert row["prompt"][0] == {"role": "system", "content": "Listen."}
    assert row["prompt"][1]["role"] == "user"
    assert row["topic"] == "t" + row["prompt"][1]["content"].removeprefix("I feel ").rstrip(".")
    assert prompt_text(row["prompt"]) == row["prompt"][1]["content"]


def test_repeated_prompts_are_left_out_also_across_files(tmp_path):
    train = write(tmp_path / "a.jsonl", [{"prompt": f"p{i % 8}"} for i in range(16)])
    test = write(tmp_path / "b.jsonl", [{"prompt": "p0"}, {"prompt": "p1"}, {"prompt": "new"}])
    splits = load_prompts(DataConfig(path=train, test_path=test, validation=2), 0, False)
    assert sorted(texts(splits.test)) == ["new", "p0", "p1"]
    assert not set(texts(splits.train)) & {"p0", "p1"}
    assert len(splits.train) == 4


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("none.jsonl", None, {}, "no such file; expected a csv, json"),
        ("empty.jsonl", "", {}, "is empty"),
        ("p.txt", "a\n", {}, "expected a file ending in"),
        ("p.jsonl", '{"promt": "a"}\n', {}, "has no column 'prompt' .*did you mean 'promt'"),
        ("p.jsonl", '{"prompt": 3}\n', {}, "row 1, column 'prompt': expected a text"),
        ("p.jsonl", '{"prompt": " "}\n', {}, "row 1, column 'prompt'"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n', {"test": 2}, "2 distinct prompts are too few to keep data.test=2"),
        ("p.jsonl", "not json\n", {}, "cannot be read as a table"),
    ],
)
def test_wrong_data_is_one_line_of_advice(tmp_path, name, content, options, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_prompts(DataConfig(path=str(tmp_path / name), **options), 0, False)


def test_a_system_prompt_without_a_chat_template_is_refused(prompts):
    with pytest.raises(UserError, match="needs a base with a chat template"):
        load_prompts(DataConfig(path=prompts, validation=2, test=2, system_prompt="x"), 0, False)
