import json
import re

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


def rows_file(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turns(*contents, role="user"):
    return [{"role": role, "content": content} for content in contents]


def test_parts_of_a_typed_content_are_one_text_and_what_a_turn_carries_stays(tmp_path):
    parts = [{"type": "text", "text": "I cannot "}, {"type": "text", "text": "sleep."}]
    path = rows_file(tmp_path, *({"prompt": [{"role": "user", "content": parts, "name": f"n{i}"}]} for i in range(9)))
    config = DataConfig(path=str(path), validation=2, test=2)
    prompt = load_prompts(config, 0, conversational=True).train["prompt"][0]
    assert [prompt[0]["role"], prompt[0]["content"], prompt[0]["name"][0]] == ["user", "I cannot sleep.", "n"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"content": "hello"}], "row 1, column 'prompt', turn 1: expected a role such as user, got None"),
        ([{"role": "", "content": "hello"}], "turn 1: expected a role"),
        ([{"role": 3, "content": "hello"}], "turn 1: expected a role such as user, got 3"),
        ([{"role": "user"}], "turn 1: expected a text as content, got None"),
        ([{"role": "user", "content": None}], "turn 1: expected a text as content, got None"),
        ([{"role": "user", "content": 7}], "turn 1: expected a text as content, got 7"),
        ([{"role": "user", "content": []}], "turn 1: expected a text as content"),
        ([{"role": "user", "content": ["a", "b"]}], "turn 1: expected a text as content"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "turn 1: content of type 'image'; only text"),
        ([{"role": "user", "content": [{"text": "untyped"}]}], "turn 1: content of type None; only text"),
        ([], r"expected a text or a list of role/content turns, got \[\]"),
        (["hello"], "expected a text or a list of role/content turns"),
        ([[{"role": "user", "content": "x"}]], "expected a text or a list of role/content turns"),
        ({"role": "user", "content": "x"}, "expected a text or a list of role/content turns"),
        (7, "expected a text or a list of role/content turns, got 7"),
        (True, "expected a text or a list of role/content turns, got True"),
        (None, "expected a text or a list of role/content turns, got None"),
        ("  ", "expected a text or a list of role/content turns, got '  '"),
    ],
)
def test_a_prompt_that_is_none_is_named_by_its_row(tmp_path, prompt, message):
    path = rows_file(tmp_path, *({"prompt": prompt, "n": i} for i in range(9)))
    with pytest.raises(UserError, match=message):
        load_prompts(DataConfig(path=str(path), validation=2, test=2), 0, conversational=True)


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids", "trainer_state", "log_metric", "image"])
def test_a_column_that_trl_takes_for_itself_is_refused(tmp_path, name):
    path = rows_file(tmp_path, *({"prompt": f"say {i}", name: "x"} for i in range(9)))
    with pytest.raises(UserError, match=f"has a column '{name}', which is what TRL hands to reward functions itself; rename"):
        load_prompts(DataConfig(path=str(path), validation=2, test=2), 0, conversational=False)


def test_the_column_of_prompts_may_be_called_prompts(tmp_path):
    path = rows_file(tmp_path, *({"prompts": f"say {i}"} for i in range(9)))
    config = DataConfig(path=str(path), prompt_column="prompts", validation=2, test=2)
    assert load_prompts(config, 0, conversational=False).train.column_names == ["prompt"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin1.jsonl", '{"prompt": "café"}\n'.encode("latin-1") * 9),
        ("latin1.csv", "prompt\ncafé\n".encode("latin-1")),
        ("bytes.jsonl", bytes(range(256)) * 4),
        ("bytes.csv", bytes(range(256)) * 4),
        ("bytes.parquet", bytes(range(256)) * 4),
        ("cut.json", b'[{"prompt": "a"}, {"pro'),
        ("mixed.jsonl", b'{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "b"}]}\n'),
        ("none.jsonl", b"\n\n"),
        ("list.jsonl", b"[1, 2]\n[3]\n"),
        ("text.jsonl", b"hello\nworld\n"),
        ("nul.csv", b"prompt\n\x00\x00\n"),
        ("ragged.csv", b'prompt,b\n1,2,3,4\n"open\n'),
    ],
)
def test_a_file_that_is_no_table_is_one_line_with_its_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(name)) as caught:
        load_prompts(DataConfig(path=str(tmp_path / name), validation=2, test=2), 0, conversational=False)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path):
    path = tmp_path / "bom.csv"
    path.write_text("prompt\n" + "\n".join(f"say {i}" for i in range(9)), encoding="utf-8-sig")
    assert len(load_prompts(DataConfig(path=str(path), validation=2, test=2), 0, conversational=False).train) == 5
