"""The command line as a user meets it: the whole job on a tiny policy, and one line for every mistake."""

import io
import json
import shutil
import subprocess
import sys
from importlib.metadata import version

import pandas as pd
import pytest
import yaml

from emorl import load_run
from emorl.cli import COMMANDS, main
from emorl.config.experiment import load_experiment
from emorl.objectives import REGISTRY

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def vowels(prompts, completions, **columns):
    return [sum(text.count(v) for v in "aeiou") / max(1, len(text)) for text in (c[0]["content"] for c in completions)]


def digits(prompts, completions, **columns):
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in (c[0]["content"] for c in completions)]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, tiny_base_dir):
    """An experiment file with two objectives, and where its results go."""
    directory = tmp_path_factory.mktemp("experiment")
    data = directory / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(24)))
    content = {
        "output": str(directory / "run"),
        "base": {"model": str(tiny_base_dir)},
        "data": {"path": str(data), "validation": 4, "test": 6},
        "objectives": {"vowels": f"{__name__}:vowels", "digits": f"{__name__}:digits"},
        "generation": {"max_new_tokens": 6, "do_sample": False},
        "train": {
            "lora": {"r": 4, "target_modules": "all-linear"},
            "grpo": {
                "max_steps": 6, "eval_steps": 3, "per_device_train_batch_size": 8, "num_generations": 4,
                "learning_rate": 3e-2, "beta": 0.0,
            },
            "collapse": {"share": 0.0},
        },
        "search": {"levels": 2},
    }  # fmt: skip
    path = directory / "experiment.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def finished(experiment):
    """Its finished run directory."""
    assert main(["run", str(experiment)]) == 0
    return experiment.parent / "run"


def output_of(capsys, *arguments):
    assert main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def mistake(capsys, *arguments):
    assert main(list(map(str, arguments))) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("emorl ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def test_run_does_the_whole_job(finished):
    assert (finished / "report" / "report.html").stat().st_size > 10_000
    trials = pd.read_csv(finished / "search" / "trials.csv")
    assert len(trials) >= 5  # each policy alone, equal weights, and a poll around the best
    summary = pd.read_csv(finished / "evaluate" / "summary.csv")
    assert {"base", "policy vowels", "policy digits", "ensemble, best found"} <= set(summary["system"])
    completions = pd.read_parquet(finished / "evaluate" / "completions.parquet")
    assert len(completions) == 6 * len(summary)


def test_the_policies_alone_in_search_and_comparison_are_the_trained_ones(finished):
    """The one-hot ensemble's validation score is what training logged for the kept checkpoint."""
    trials = pd.read_csv(finished / "search" / "trials.csv")
    for name in ("vowels", "digits"):
        alone = trials[trials[f"weight_{name}"] == 1.0].iloc[0]
        trained = json.loads((finished / "train" / name / "result.json").read_text())
        assert alone[f"score_{name}"] == pytest.approx(trained["reward"], abs=1e-6)


def test_a_second_run_does_nothing_again(experiment, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    before |= {path: path.stat().st_mtime_ns for path in [finished / "search" / "trials.csv"]}
    assert main(["run", str(experiment)]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_trained_agent_joins_the_comparison(experiment, finished, tmp_path, capsys):
    pytest.importorskip("torchrl", reason="needs the extra rl")
    copy = shutil.copytree(finished, tmp_path / "run")
    few = ["dynamic.agents=[ppo]", "dynamic.spans=[2]", "dynamic.ppo.updates=1", "dynamic.ppo.prompts=2", "dynamic.span=2"]
    assert "| RLAE-PPO | 2 |" in output_of(capsys, "dynamic", experiment, f"output={copy}", f"policies={finished}", *few)
    comparison = json.loads(output_of(capsys, "evaluate", experiment, f"output={copy}", "--json"))
    assert [system["system"] for system in comparison["systems"]].count("dynamic ensemble") == 1
    assert main(["report", str(copy)]) == 0
    assert "dynamic ensemble" in (copy / "report" / "report.html").read_text()


def test_every_stage_gives_json(experiment, finished, capsys):
    search = json.loads(output_of(capsys, "search", experiment, "--json"))
    assert search["trials"] >= 5
    assert set(search["best"]["weights"]) == {"vowels", "digits"}
    comparison = json.loads(output_of(capsys, "evaluate", experiment, "--json"))
    assert {check["objective"] for check in comparison["hacking"]["objectives"]} == {"vowels", "digits"}
    assert all(0 <= system["edit_rate"] <= 1 for system in comparison["systems"])
    training = json.loads(output_of(capsys, "train", experiment, "--objective", "vowels", "--json"))
    assert training["vowels"]["objective"] == "vowels"


def test_a_finished_comparison_gets_the_attacks_it_lacks_and_nothing_else(experiment, finished, tmp_path, capsys):
    copy = shutil.copytree(finished, tmp_path / "run")
    (copy / "evaluate" / "hacking.json").unlink()
    tables = {path: path.stat().st_mtime_ns for path in (copy / "evaluate" / "systems").iterdir()}
    calls = json.loads((copy / "evaluate" / "cost.json").read_text())["reward_calls"]
    assert main(["evaluate", str(experiment), f"output={copy}", "evaluate.attacks=false"]) == 0
    assert not (copy / "evaluate" / "hacking.json").exists()
    capsys.readouterr()
    content = json.loads(output_of(capsys, "evaluate", experiment, f"output={copy}", "--json"))
    assert content["hacking"] == json.loads((finished / "evaluate" / "hacking.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in tables} == tables
    spent = sum(check["scored"] for check in content["hacking"]["objectives"])
    assert json.loads((copy / "evaluate" / "cost.json").read_text())["reward_calls"] == calls + spent


def test_attacks_interrupted_after_one_objective_go_on_with_the_other(experiment, finished, tmp_path, capsys):
    copy = shutil.copytree(finished, tmp_path / "run")
    path = copy / "evaluate" / "hacking.json"
    whole = json.loads(path.read_text())
    kept = {**whole["objectives"][0], "scored": -1}
    path.write_text(json.dumps({**whole, "objectives": [kept]}))
    content = json.loads(output_of(capsys, "evaluate", experiment, f"output={copy}", "--json"))
    assert content["hacking"] == {**whole, "objectives": [kept, whole["objectives"][1]]}


def test_training_logs_length_and_repetition_beside_the_reward(finished):
    log = json.loads((finished / "train" / "vowels" / "result.json").read_text())["log"]
    validations = [entry for entry in log if "eval_reward" in entry]
    assert all(entry["eval_words"] >= 0 and 0 <= entry["eval_repeated_trigrams"] < 1 for entry in validations)


def test_perplexity_under_a_configured_model_is_in_the_summary(experiment, finished, tmp_path, tiny_base_dir, capsys):
    copy = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("evaluate"))
    options = (
        f"output={copy}",
        f"evaluate.perplexity_model={tiny_base_dir}",
        "evaluate.attacks=false",
        "evaluate.front_points=1",
    )
    content = json.loads(output_of(capsys, "evaluate", experiment, *options, "--json"))
    assert all(system["perplexity"] > 1 and system["paper_perplexity"] > 1 for system in content["systems"])
    assert content["hacking"] is None


def test_a_missing_column_of_references_is_named(experiment, finished, tmp_path, capsys):
    copy = shutil.copytree(finished, tmp_path / "run")
    line = mistake(capsys, "evaluate", experiment, f"output={copy}", "evaluate.references=answers")
    assert "evaluate.references: the data has no column 'answers'" in line


def test_generate_answers_by_preference_without_search_or_training(finished, capsys, monkeypatch):
    front = json.loads((finished / "search" / "result.json").read_text())["front"]
    lines = output_of(capsys, "generate", finished, "--prefer", "vowels=1", "--prompt", "say 1", "--json").splitlines()
    answer = json.loads(lines[0])
    assert answer["scores"]["vowels"] == max(point["scores"]["vowels"] for point in front)
    assert answer["prompt"] == "say 1"
    monkeypatch.setattr("sys.stdin", io.StringIO("say 1\n\nsay 2\n"))
    texts = output_of(capsys, "generate", finished, "--prefer", "vowels=1").splitlines()
    assert len(texts) == 2
    assert texts[0] == answer["completion"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["serch.levels=1"], "unknown key 'serch'; did you mean 'search'"),
        (["search.levels=-1"], "expected a number of at least 1, got -1"),
        (["data.path=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["data.prompt_column=promt"], "has no column 'promt' (data.prompt_column); did you mean 'prompt'"),
        (["base.model=./nowhere"], "base.model './nowhere': no such folder"),
        (["evaluate.perplexity_model=./nowhere"], "evaluate.perplexity_model './nowhere' is not a folder"),
        (["search.proposer=hierarchical"], "no proposer is called 'hierarchical'; did you mean 'hierarchical_grid'"),
        (["objectives.vowels=lenght"], "no objective function is called 'lenght'; did you mean 'length'"),
        (["train.grpo.learning_rat=1"], "did you mean 'learning_rate'"),
        (["train.lora.rank=1"], "unknown key 'train.lora.rank'"),
        (["generation.max_new_token=3"], "generation: unknown setting 'max_new_token'; did you mean 'max_new_tokens'"),
        (["generation.max_new_tokens=-3"], "generation: "),
        (["seed=1"], "holds a run with other settings (seed: 0 -> 1)"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(experiment, finished, capsys, overrides, message):
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*.safetensors"))
    if not overrides[0].startswith("seed"):
        overrides = [*overrides, f"output={experiment.parent / 'other'}"]
    assert message in mistake(capsys, "run", experiment, *overrides)
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*.safetensors")) == before


def test_a_changed_experiment_does_not_overwrite_the_finished_ones_settings(experiment, finished, capsys):
    before = (finished / "experiment.yaml").read_text()
    mistake(capsys, "run", experiment, "seed=1")
    assert (finished / "experiment.yaml").read_text() == before


def test_stages_out_of_order_say_what_to_run_first(experiment, capsys):
    fresh = f"output={experiment.parent / 'fresh'}"
    assert "no trained policy for digits, vowels" in mistake(capsys, "search", experiment, fresh)
    assert "run the stage that writes it first" in mistake(capsys, "evaluate", experiment, fresh)
    assert "is not a run directory" in mistake(capsys, "generate", experiment.parent / "nowhere", "--prompt", "x")
    assert "is not a run directory" in mistake(capsys, "report", experiment.parent / "nowhere")


def test_policies_of_another_output_are_searched_and_compared_without_training(experiment, finished, capsys, tmp_path):
    settings = [f"policies={finished}", f"output={tmp_path / 'other'}", "value.scalarize=minimum"]
    output_of(capsys, "run", experiment, *settings)
    assert not (tmp_path / "other" / "train").exists()
    assert (tmp_path / "other" / "report" / "report.html").exists()
    shutil.move(tmp_path / "other", tmp_path / "moved")
    assert output_of(capsys, "generate", tmp_path / "moved", "--prefer", "vowels=1", "--prompt", "say 1")
    nowhere = [f"policies={tmp_path / 'nowhere'}", f"output={tmp_path / 'x'}"]
    assert "or give `policies`" in mistake(capsys, "train", experiment, *nowhere)


def test_a_search_that_its_budget_ended_goes_on_with_a_larger_one(experiment, finished, capsys, tmp_path):
    settings = [f"policies={finished}", f"output={tmp_path / 'budget'}", "value.scalarize=minimum"]
    first = json.loads(output_of(capsys, "search", experiment, *settings, "search.trials=1", "--json"))
    assert first["trials"] == 1
    assert first["best"]["value"] == pytest.approx(min(first["best"]["scores"].values()))
    journal = (tmp_path / "budget" / "search" / "journal.log").read_bytes()
    assert json.loads(output_of(capsys, "search", experiment, *settings, "search.trials=1", "--json")) == first
    assert (tmp_path / "budget" / "search" / "journal.log").read_bytes() == journal
    whole = json.loads(output_of(capsys, "search", experiment, *settings, "--json"))
    assert whole["ended_by_budget"] is None
    assert whole["trials"] >= 5
    cost = json.loads((tmp_path / "budget" / "search" / "cost.json").read_text())
    assert cost["completions"] == 4 * whole["trials"]  # counted once


def test_wrong_preferences_are_one_line(finished, capsys):
    assert "expected objective=number" in mistake(capsys, "generate", finished, "--prefer", "vowels", "--prompt", "x")
    assert "preferences name vowel" in mistake(capsys, "generate", finished, "--prefer", "vowel=1", "--prompt", "x")
    assert "not all 0" in mistake(capsys, "generate", finished, "--prefer", "vowels=0", "--prompt", "x")


def test_a_damaged_journal_is_one_line_and_left_alone(experiment, finished, capsys, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    for name in ("run.json", "result.json", "trials.csv"):
        (copy / "search" / name).unlink()
    journal = copy / "search" / "journal.log"
    journal.write_bytes(b"garbage\n" + journal.read_bytes())
    content = journal.read_bytes()
    assert "is damaged and cannot be read as an Optuna journal" in mistake(capsys, "search", experiment, f"output={copy}")
    assert journal.read_bytes() == content


def test_an_adapter_of_another_base_is_one_line(experiment, finished, capsys, tmp_path, make_causal_model, tokenizer):
    copy, other = tmp_path / "copy", tmp_path / "base"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "search")
    make_causal_model("llama", seed=5).save_pretrained(other)
    tokenizer.save_pretrained(other)
    line = mistake(capsys, "search", experiment, f"output={copy}", f"base.model={other}")
    assert "another base" in line


def fussy(prompts, completions, **columns):
    return [1 / len(completion[0]["content"].split()) for completion in completions]


def with_transform(block):
    return f"objectives.vowels={{function: {__name__}:vowels, transform: {block}}}"


def test_objectives_lists_the_registry_with_ranges_and_examples(capsys):
    text = output_of(capsys, "objectives")
    for name in REGISTRY:
        assert f"\n{name} " in text
    assert "[0, 1]" in text
    assert "needs model" in text
    listed = json.loads(output_of(capsys, "objectives", "--json"))
    examples = {entry["name"]: entry["example"] for entry in listed["objectives"]}
    assert examples["distinct_2"] == 0.75
    assert f'"{listed["example"]["completion"]}"' in text


def test_objectives_check_scores_edge_cases_and_passes(experiment, capsys):
    text = output_of(capsys, "objectives", "check", experiment, with_transform("{range: [0, 1], log: true}"))
    assert "all checks passed" in text
    assert "clipped to [0.0001, 0.9999]; training reward log(score)" in text
    assert "normal, as plain text *" in text  # a conversation is what this base reads
    checks = json.loads(output_of(capsys, "objectives", "check", experiment, "--json"))
    assert checks["passed"]
    cases = {case["case"]: case for case in checks["objectives"]["digits"]["cases"]}
    assert {"empty", "5,000 words", "Arabic", "only punctuation"} <= set(cases)
    assert cases["JSON"]["score"] == pytest.approx(2 / 45)


def test_objectives_check_exits_with_1_and_names_what_failed(experiment, capsys):
    arguments = ["objectives", "check", str(experiment), f"objectives.fussy={__name__}:fussy"]
    assert main(arguments) == 1
    text = capsys.readouterr().out
    assert "! fussy, empty: objective 'fussy' raised ZeroDivisionError" in text
    assert "failed: fussy" in text
    assert main([*arguments, "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)
    assert (checks["passed"], checks["objectives"]["vowels"]["passed"]) == (False, True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objectives.vowels=lenght", "no objective function is called 'lenght'; did you mean 'length'"),
        (with_transform("{log: true}"), "objective 'vowels': transform: its function declares no range"),
        (with_transform("{rang: [0, 1]}"), "unknown key 'objectives.vowels.transform.rang'; did you mean 'range'"),
        ("data.path=nowhere.jsonl", "nowhere.jsonl: no such file"),
    ],
)
def test_a_wrong_experiment_is_one_line_for_the_check_too(experiment, capsys, override, message):
    line = mistake(capsys, "objectives", "check", experiment, override)
    assert line.startswith("emorl objectives check: ")
    assert message in line


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_teaches_the_keys_of_that_command_alone(command, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["emorl", command, "--help"])
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert COMMANDS[command].split(";")[0][:40] in " ".join(text.split())
    keys = {"\n  train.grpo  straight to trl.GRPOConfig": ("run", "train", "samples", "compare"),
            "\n  search.proposer [auto]": ("run", "search", "compare"),
            "\n  evaluate.attacks [True]": ("run", "evaluate", "compare"),
            "\n  dynamic.agent.states [True]": ("dynamic",)}  # fmt: skip
    assert {key: command in commands for key, commands in keys.items()} == {key: key in text for key in keys}


def test_without_a_command_the_help_is_shown_and_a_version_is_said(capsys):
    assert output_of(capsys).startswith("usage: emorl [-h] [--version] COMMAND")
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"emorl {version('emorl')}\n"


def test_keys_prints_a_block_or_all_of_them(capsys):
    assert "fuse.method [linear]" in output_of(capsys, "keys")
    text = output_of(capsys, "keys", "value")
    assert text.startswith("  value  ")
    assert "value.scalarize [mean]" in text
    assert "search." not in text
    assert "no block of an experiment is called 'serch'; did you mean 'search'" in mistake(capsys, "keys", "serch")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_that_completes(capsys, tmp_path, shell):
    script = tmp_path / "completion"
    script.write_text(output_of(capsys, "completion", shell))
    if shell == "bash":
        asked = {"COMP_CWORD=1 COMP_WORDS=(emorl sea)": "search", "COMP_CWORD=2 COMP_WORDS=(emorl search --sto)": "--storage"}
        for words, expected in asked.items():
            code = f'source {script}; {words}; _emorl; printf "%s\\n" "${{COMPREPLY[@]}}"'
            done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
            assert done.stdout.split() == [expected]


def test_init_writes_a_file_that_parses_and_overwrites_nothing(capsys, tmp_path, tiny_base_dir):
    path, data = tmp_path / "mine.yaml", tmp_path / "prompts.csv"
    data.write_text("prompt\n" + "\n".join(f"say {i}" for i in range(80)))
    options = ["--model", str(tiny_base_dir), "--data", str(data)]
    assert output_of(capsys, "init", path, *options) == ""
    written = load_experiment(path)
    assert (written.base.model, written.output.name) == (str(tiny_base_dir), "mine")
    assert written.train.grpo["max_steps"] == 400
    assert "is there already; give another FILE" in mistake(capsys, "init", path, *options)
    few = ["train.grpo.max_steps=1", "train.grpo.eval_steps=1", "search.levels=1", "generation.max_new_tokens=4",
           "train.grpo.per_device_train_batch_size=8", "evaluate.attacks=false", f"output={tmp_path / 'run'}"]  # fmt: skip
    assert main(["run", str(path), *few]) == 0


def test_generate_takes_weights_and_settings_and_says_which_weights_it_used(finished, capsys):
    ask = ("generate", finished, "--prompt", "say 1", "--json")
    search = json.loads((finished / "search" / "result.json").read_text())
    assert main(list(map(str, ask))) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["weights"] == search["best"]["weights"]
    shown = ", ".join(f"{name} {weight:.3g}" for name, weight in search["best"]["weights"].items())
    assert f"weights: {shown}\n" in captured.err
    answer = json.loads(output_of(capsys, *ask, "--weights", "vowels=1"))
    assert answer["weights"] == {"vowels": 1.0, "digits": 0.0}
    shorter = json.loads(output_of(capsys, *ask, "--weights", "vowels=1", "generation.max_new_tokens=2"))
    assert len(shorter["completion"]) < len(answer["completion"])
    assert "no policy is called 'digit'; did you mean 'digits'" in mistake(capsys, *ask, "--weights", "digit=1")
    assert "use one of both" in mistake(capsys, *ask, "--weights", "digits=1", "--prefer", "digits=1")
    assert "only settings of decoding" in mistake(capsys, *ask, "seed=1")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "nowhere", "--prompt", "x"], "is not a run directory"),
        (["generate", "RUN", "--prompt", "x", "--prefer", "vowel=1"], "preferences name vowel"),
        (["report", "nowhere"], "is not a run directory"),
        (["search", "EXPERIMENT", "search.levels=x"], "search.levels"),
        (["train", "EXPERIMENT", "--objective", "vowel"], "did you mean 'vowels'"),
        (["dynamic", "EXPERIMENT", "value.scalarize=chebyshev"], "chebyshev is no reward"),
        (["run", "EXPERIMENT", "data.path=prompt.jsonl"], "prompt.jsonl: no such file"),
        (["train", "EXPERIMENT", "base.model=./nowhere", "output=none"], "base.model './nowhere': no such folder"),
        (["search", "EXPERIMENT", "data.test_path=prompt.jsonl", "output=none"], "prompt.jsonl: no such file"),
        (["compare", "EXPERIMENT", "data.path=prompt.jsonl"], "prompt.jsonl: no such file"),
        (["fuse"], "no FILE given"),
    ],
)
def test_a_cheap_mistake_waits_for_no_library(experiment, finished, command, message):
    """In a process of its own: torch is never imported."""
    places = {"EXPERIMENT": str(experiment), "RUN": str(finished)}
    words = [places.get(word, word) for word in command]
    code = "import sys; from emorl.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
    assert message in done.stderr


def test_policies_that_something_else_trained_are_searched_compared_and_reported(
    experiment, tmp_path, make_causal_model, write_adapter
):
    """As TRL's own command line leaves them: an adapter without `policy.json`, and no record of its training."""
    for seed, name in enumerate(("vowels", "digits")):
        write_adapter(make_causal_model("llama"), tmp_path / "elsewhere" / "train" / name / "policy", seed=seed)
    where = [f"policies={tmp_path / 'elsewhere'}", f"output={tmp_path / 'run'}", "search.levels=1", "evaluate.attacks=false"]
    assert main(["run", str(experiment), *where]) == 0
    assert (tmp_path / "run" / "report" / "report.html").exists()


def test_policies_may_be_named_one_by_one(experiment, tmp_path, make_causal_model, write_adapter, capsys):
    folders = {name: tmp_path / f"adapter of {name}" for name in ("vowels", "digits")}
    for seed, folder in enumerate(folders.values()):
        write_adapter(make_causal_model("llama"), folder, seed=seed)
    rest = [f"output={tmp_path / 'run'}", "search.levels=1", "evaluate.attacks=false"]
    named = "policies={" + ", ".join(f"{name}: '{folder}'" for name, folder in folders.items()) + "}"
    assert main(["run", str(experiment), named, *rest]) == 0
    assert set(load_run(tmp_path / "run").costs.index) == {"search", "evaluate", "total"}
    capsys.readouterr()
    assert "expected one adapter for each of ['digits', 'vowels'], got ['vowels']" in mistake(
        capsys, "run", experiment, "policies={vowels: x}", *rest
    )
    nowhere = "policies={vowels: nowhere, digits: nowhere}"
    assert "policies.digits: no adapter in nowhere" in mistake(capsys, "search", experiment, nowhere, f"output={tmp_path}/none")


def test_an_objective_is_added_to_a_finished_experiment(experiment, finished, tmp_path, capsys):
    """Its policy is trained beside the others; what was found without it stays, and the line says how to search again."""
    grown, run = tmp_path / "grown.yaml", tmp_path / "run"
    shutil.copytree(finished, run)
    content = yaml.safe_load(experiment.read_text())
    content["objectives"]["length"] = {"function": "length", "minimum": 1, "maximum": 4}
    grown.write_text(yaml.safe_dump({**content, "output": str(run)}))
    line = mistake(capsys, "run", grown)
    assert f"give another `output` (`policies={run}` uses the trained policies again)" in line
    assert (run / "train" / "length" / "result.json").is_file()
    again = [f"output={tmp_path / 'again'}", f"policies={run}", "search.levels=1", "evaluate.attacks=false"]
    assert main(["run", str(grown), *again]) == 0
    assert {"policy vowels", "policy digits", "policy length"} <= set(load_run(tmp_path / "again").summary["system"])


def test_overrides_may_stand_behind_an_option(experiment, tmp_path, capsys):
    arguments = ["train", str(experiment), "--objective", "vowels", f"output={tmp_path}", "train.grpo.max_steps=many"]
    assert main(arguments) == 2
    assert "train.grpo.max_steps: expected a whole number of at least 1, got 'many'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", "run", "output=elsewhere"])
    assert "unrecognized arguments: output=elsewhere" in capsys.readouterr().err


def test_a_single_policy_trains_and_has_no_weights_to_search(experiment, tmp_path, capsys):
    where = [f"output={tmp_path}", "train.mode=uniform", "train.grpo.max_steps=2"]
    assert main(["train", str(experiment), *where, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["uniform"]
    assert result["reward_weights"] == {"vowels": 0.5, "digits": 0.5}
    for command in ("search", "run"):
        assert main([command, str(experiment), *where]) == 2
        assert "train.mode=uniform trains one policy, which has no weights to search" in capsys.readouterr().err
