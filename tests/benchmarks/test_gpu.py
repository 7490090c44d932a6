"""The device check keeps what it has, whatever happens to a part; its timings are not tested."""

import json

import pytest
import torch

from benchmarks.gpu import check
from benchmarks.gpu.parts import PARTS, bytewise, spaces, vowels


def test_every_part_is_planned_and_all_fit_the_ten_minutes_of_a_call():
    assert {part for part, _, _ in check.PLAN} == set(PARTS)
    assert check.PLAN[0][0] == "machine"
    assert {size for _, size, _ in check.PLAN} == {"134m", "1b"}


def test_a_dry_run_leaves_a_table_and_rows(tmp_path, capsys):
    assert check.main(["--output", str(tmp_path), "--dry-run", "--parts", "union"]) == 0
    (row,) = json.loads((tmp_path / "check.json").read_text())
    assert (row["part"], row["model"], row["to"]) == ("union", "tiny", "generate() in turn")
    assert row["ratio"] > 0
    assert row["bound"] > 0
    assert "| union | tiny |" in (tmp_path / "check.md").read_text()
    assert "union tiny: " in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["check.json", "check.log", "check.md"]


def test_parts_without_time_are_rows_that_say_so(tmp_path):
    assert check.main(["--output", str(tmp_path), "--seconds", "0"]) == 1
    rows = json.loads((tmp_path / "check.json").read_text())
    assert [(row["part"], row["model"]) for row in rows] == [(part, size) for part, size, _ in check.PLAN]
    assert {row["what"] for row in rows} == {"left out: no time left"}


def test_a_part_that_takes_too_long_is_stopped(tmp_path):
    (row,) = check.run_part("machine", "tiny", "cpu", 0.05, tmp_path)
    assert row == {"part": "machine", "model": "tiny", "what": "stopped after 0 s", "failed": True}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a part that asks for CUDA fails where there is none")
def test_a_part_that_fails_says_where_to_look(tmp_path):
    (row,) = check.run_part("machine", "tiny", "cuda", 120, tmp_path)
    assert row["what"] == "failed with 1, see check.log"
    assert "CUDA" in (tmp_path / "check.log").read_text()


def test_the_tokenizer_is_trained_on_the_documents_and_keeps_every_byte():
    tokenizer = bytewise(600)
    assert len(tokenizer) == 600
    text = "Größe 中文 🌊 and policies"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_rewards_of_the_check_by_hand():
    assert vowels([], ["banana", "xyz"]) == [3 / 20, 0]
    assert spaces([], ["a b c", "a"]) == [0.2, 0]
