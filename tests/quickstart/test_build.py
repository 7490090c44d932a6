import json
from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from emorl.quickstart import build as builder
from emorl.quickstart.build import BuildConfig, build
from emorl.runs.progress import Silent

TINY = BuildConfig(vocabulary=400, hidden=16, layers=1, batch=4, base_steps=3, judge_steps=2, fluency_steps=2, prompts=20)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return build(tmp_path_factory.mktemp("parts"), seed=0, config=TINY)


def _parameters(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def test_every_part_loads_by_the_auto_classes(parts):
    for path in (parts.base, parts.fluency):
        AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)
    for path in (parts.reflection, parts.empathy):
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForSequenceClassification.from_pretrained(path, use_safetensors=True).eval()
        inputs = tokenizer(["I feel sad."] * 2, ["", "You feel sad."], padding=True, return_tensors="pt")
        assert model(**inputs).logits.shape == (2, 1)
        assert model.config.id2label == {0: path.name}
    rows = [json.loads(line) for line in parts.prompts.read_text().splitlines()]
    assert len(rows) == 20
    assert set(rows[0]) == {"prompt", "topic", "feeling", "cause", "time", "detail"}


def test_the_policy_answers_and_ends_with_its_end_token(parts):
    tokenizer = AutoTokenizer.from_pretrained(parts.base)
    model = AutoModelForCausalLM.from_pretrained(parts.base)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    chat = [{"role": "user", "content": "I feel sad."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[1] <= inputs["input_ids"].shape[1] + 2


def test_judges_read_the_pair_as_the_chat_template_renders_it(parts):
    tokenizer = AutoTokenizer.from_pretrained(parts.reflection)
    prompt, response = "I miss my old garden.", "You miss your old garden."
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    assert tokenizer(prompt, response)["input_ids"] == tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert tokenizer.decode(tokenizer("It's 9 p.m. — naïve?")["input_ids"]).strip() == "It's 9 p.m. — naïve?"


def test_a_second_call_builds_nothing(parts):
    before = {path: path.stat().st_mtime_ns for path in asdict(parts).values()}

    class Loud(Silent):
        def say(self, line):
            raise AssertionError(f"built again: {line}")

    assert build(parts.base.parent.parent, seed=0, progress=Loud(), config=TINY) == parts
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_same_seed_same_parts_and_another_seed_another_place(parts, tmp_path):
    again = build(tmp_path, seed=0, config=TINY)
    for name, tensor in _parameters(parts.base).items():
        assert torch.equal(tensor, _parameters(again.base)[name])
    assert build(tmp_path, seed=1, config=replace(TINY, prompts=5)).base.parent != again.base.parent


def test_building_leaves_the_callers_randomness_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build(tmp_path, config=TINY)
    assert torch.equal(torch.rand(3), expected)


def test_a_kill_leaves_no_half_part_and_the_next_call_finishes(tmp_path, monkeypatch):
    def die(model, tokenizer, path):
        path.mkdir()
        (path / "half").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builder, "_save", die)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, config=TINY)
    (home,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert not (home / "base").exists()
    (home / ".building-left-by-sigkill").mkdir()
    parts = build(tmp_path, config=TINY)
    assert all(path.exists() for path in asdict(parts).values())
    assert not list(home.glob(".building-*"))
