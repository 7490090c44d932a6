"""More than 200 mistakes across all commands: each is one line and exit code 2, none is a traceback, none is believed."""

import json
import re

import pytest
import yaml

from tests.faults import wrong_inputs as wrong

REWARDS = """\
def vowels(completions, **columns):
    return [sum(map(text[0]["content"].count, "aeiou")) / 50 for text in completions]

def digits(completions, **columns):
    return [sum(map(str.isdigit, text[0]["content"])) / 50 for text in completions]

def no_arguments():
    return 1

def returns_text(completions, **columns):
    return "good"

def returns_one(completions, **columns):
    return [1.0]

def returns_nan(completions, **columns):
    return [float("nan")] * len(completions)

def returns_words(completions, **columns):
    return ["good"] * len(completions)

def raises(completions, **columns):
    return [1 / 0 for _ in completions]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_base_dir, command):
    """A folder with an experiment, its finished run, and every wrong file."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "wrong_rewards.py").write_text(REWARDS)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(16)))
    content = {
        "output": "run",
        "base": {"model": str(tiny_base_dir)},
        "data": {"path": "prompts.jsonl", "validation": 4, "test": 4},
        "objectives": {"vowels": "wrong_rewards:vowels", "digits": "wrong_rewards:digits"},
        "generation": {"max_new_tokens": 4, "do_sample": False},
        "train": {
            "lora": {"r": 2, "target_modules": "all-linear"},
            "grpo": {"max_steps": 1, "eval_steps": 1, "per_device_train_batch_size": 8, "num_generations": 4},
            "collapse": {"share": 0.0},
        },
        "search": {"levels": 1},
        "evaluate": {"attacks": False},
    }  # fmt: skip
    (folder / "experiment.yaml").write_text(yaml.safe_dump(content))
    for name, (data, _) in wrong.DATA.items():
        if data is not None:
            (folder / name).write_bytes(data)
    for name, (text, _) in wrong.FILES.items():
        (folder / name).write_text(text)
    done = command("run", "experiment.yaml", folder=folder)
    assert done["code"] == 0, done["error"]
    return folder


def setting_of(block, setting):
    """A setting of a block, or the whole of it."""
    return f"{block}={setting}" if setting.startswith("{") else f"{block}.{setting}"


def cases():
    experiment = ["run", "EXP", "output=OUT"]
    for key, values in wrong.NUMBERS.items():
        yield from (([*experiment, f"{key}={value}"], re.escape(key.rpartition(".")[2])) for value in values)
    yield from (([*experiment, setting], words) for setting, words in wrong.SETTINGS)
    yield from ((["train", "EXP", "output=OUT", f"train.grpo.{setting}"], words) for setting, words in wrong.TRAINING)
    yield from ((["train", "EXP", "output=OUT", f"train.lora.{setting}"], words) for setting, words in wrong.LORA)
    yield from ((["train", "EXP", "output=OUT", f"generation.{setting}"], words) for setting, words in wrong.GENERATION)
    yield from ((["train", "EXP", "output=OUT", f"data.path={name}"], words) for name, (_, words) in wrong.DATA.items())
    yield from (
        (["train", "EXP", "output=OUT", f"objectives={{x: {function}}}"], words) for function, words in wrong.OBJECTIVES
    )
    yield from ((["distill", "EXP", setting_of("distill", setting)], words) for setting, words in wrong.DISTILL)
    yield from wrong.COMMANDS
    yield from (([name, file], words) for file, (_, words) in wrong.FILES.items() for name in ("run", "fuse"))


CASES = list(cases())


def test_there_are_more_than_two_hundred_of_them():
    assert len({" ".join(arguments) for arguments, _ in CASES}) > 200


@pytest.mark.parametrize(("arguments", "words"), CASES, ids=[" ".join(arguments)[:90] for arguments, _ in CASES])
def test_a_mistake_is_one_line_that_names_it(place, command, arguments, words, tmp_path):
    places = {"EXP": "experiment.yaml", "output=OUT": f"output={tmp_path / 'out'}", "RUN": "run", "RUN/train": "run/train"}
    done = command(*(places.get(argument, argument) for argument in arguments), folder=place)
    assert done["code"] == 2, done
    assert "Traceback" not in done["error"]
    lines = [line for line in done["error"].splitlines() if re.match(r"emorl( [\w -]+)?: ", line)]
    assert len(lines) == 1, done["error"]
    assert re.search(words, lines[0]), lines[0]
    assert not list((tmp_path / "out").rglob("adapter_model.safetensors"))
