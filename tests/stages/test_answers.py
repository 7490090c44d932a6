"""Answers behind a mark, and templates that are told something: alike in every stage."""

import json

import pytest
import yaml

from emorl import load_run
from emorl.cli import main

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

MARK = "e"
SEEN: list[str] = []


def seen(prompts, completions, **columns):
    """Remembers what it was shown."""
    texts = [completion[0]["content"] for completion in completions]
    SEEN.extend(texts)
    return [min(1.0, len(text) / 50) for text in texts]


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_causal_model, tokenizer):
    """A base whose answers come behind every tenth byte or so, as it is told to think or not."""
    folder = tmp_path_factory.mktemp("marked")
    model = make_causal_model("llama")
    mark = tokenizer.convert_tokens_to_ids(MARK)
    model.get_output_embeddings().weight.data[mark] *= 3  # says the mark now and then
    model.save_pretrained(folder / "base")
    told = tokenizer.__class__.from_pretrained(_saved(tokenizer, folder / "base"))
    told.chat_template = "{% if not think %}be quick {% endif %}" + tokenizer.chat_template
    told.save_pretrained(folder / "base")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(20)))
    content = {
        "output": str(folder / "run"),
        "base": {"model": str(folder / "base")},
        "data": {
            "path": str(folder / "prompts.jsonl"), "validation": 4, "test": 4, "after": MARK,
            "chat_template_kwargs": {"think": True},
        },
        "objectives": {"one": f"{__name__}:seen", "two": f"{__name__}:seen"},
        "generation": {"max_new_tokens": 24, "do_sample": True, "temperature": 2.0},
        "train": {
            "grpo": {"max_steps": 1, "eval_steps": 1, "per_device_train_batch_size": 8, "num_generations": 4},
            "collapse": {"share": 0.0},
        },
        "search": {"levels": 1, "trials": 3},
        "evaluate": {"attacks": False},
    }  # fmt: skip
    (folder / "experiment.yaml").write_text(yaml.safe_dump(content))
    SEEN.clear()
    assert main(["run", str(folder / "experiment.yaml")]) == 0
    return folder / "run"


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def test_objectives_see_what_comes_behind_the_mark_in_every_stage(run):
    assert SEEN
    assert any(SEEN), "some answers hold the mark"
    assert not any(MARK in text for text in SEEN)


def test_the_report_of_answers_keeps_the_whole_text_beside(run):
    table = load_run(run).completions
    marked = table["generated"].str.contains(MARK)
    assert marked.any()
    assert (table.loc[~marked, "completion"] == "").all()
    assert (
        table["completion"].str.strip()
        == [text.rpartition(MARK)[2].strip() if MARK in text else "" for text in table["generated"]]
    ).all()
    assert (table["tokens"] > 0).all()  # what was thought is paid for


def test_what_is_shown_and_saved_is_asked_and_read_alike(run, capsys):
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "say 1", "--json"]) == 0
    assert MARK not in json.loads(capsys.readouterr().out)["completion"]
    for folder in (run / "search" / "ensemble", run / "train" / "one" / "policy"):
        template = folder / "chat_template.jinja"
        assert template.read_text().count("{% set think = true %}") == 1


def test_a_setting_of_its_own_for_training_is_refused(run, capsys):
    assert (
        main(
            ["train", str(run / "experiment.yaml"), f"output={run / 'other'}", "train.grpo.chat_template_kwargs={think: true}"]
        )
        == 2
    )
    assert "train.grpo.chat_template_kwargs is set by emorl; use data.chat_template_kwargs" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "a b", "1x"])
def test_what_is_no_argument_of_a_template_is_refused(run, capsys, name):
    assert main(["train", str(run / "experiment.yaml"), f"data.chat_template_kwargs={{'{name}': 1}}"]) == 2
    assert f"'{name}' is no argument that a template can be given" in capsys.readouterr().err


def test_prompts_longer_than_the_model_are_refused_before_it_loads(run, capsys):
    assert main(["train", str(run / "experiment.yaml"), f"output={run / 'long'}", "generation.max_new_tokens=100000"]) == 2
    assert "need 100," in capsys.readouterr().err
