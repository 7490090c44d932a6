"""The fusion stage: given or searched settings become one PEFT adapter, and what was searched in memory is what is written."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from peft import PeftModel

from emorl.cli import main
from emorl.config import UserError
from emorl.config.experiment import BaseConfig, DataConfig, Experiment, ObjectiveConfig
from emorl.config.fuse import PolicyFuseConfig, StrataConfig
from emorl.config.yaml import to_yaml
from emorl.data import load_prompts
from emorl.evaluation.scoring import evaluate
from emorl.fusion.loaded import loaded_adapters, loaded_models
from emorl.fusion.operators import OPERATORS, Fusion
from emorl.objectives.loading import load_objective
from emorl.policies.adapters import read_adapter
from emorl.policies.base import load_base
from emorl.runs.layout import Layout
from emorl.runs.results import FusionResult, read_result
from emorl.search.fusion_evaluation import FusionEvaluator
from emorl.search.study import finished_trials, open_study
from emorl.stages.stage import perform

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def share(letters):
    def function(prompts, completions, **columns):
        texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
        topics = columns.get("topic", ["b"] * len(texts))
        found = [sum(map(text.count, letters)) / max(1, len(text)) for text in texts]
        return [0.0 if topic == "a" else own for own, topic in zip(found, topics, strict=True)]

    return function


e_share, a_share = share("abcdefghijklm"), share("\\]^_`{|}~nopqr")


@pytest.fixture
def experiment(tmp_path, tiny_base_dir, make_causal_model, write_adapter):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {word} {i}"}) + "\n" for i in range(8) for word in ("yes", "no")))
    base = make_causal_model("llama")
    for seed, name in enumerate("ea"):
        write_adapter(base, tmp_path / "run" / "train" / name / "policy", seed=seed)
    return Experiment(
        output=tmp_path / "run",
        base=BaseConfig(model=str(tiny_base_dir)),
        data=DataConfig(path=str(data), validation=4, test=4),
        objectives={name: ObjectiveConfig(function=f"{__name__}:{name}_share") for name in ("e", "a")},
        generation={"max_new_tokens": 6, "do_sample": False},
    )


def fuse_policies(experiment):
    """The fusion's run directory."""
    perform("fuse", experiment)
    return experiment.output / "fuse"


def read_fusion(experiment):
    return read_result(FusionResult, experiment.output / "fuse")


def with_fuse(experiment, **settings):
    return replace(experiment, fuse=PolicyFuseConfig(**settings))


@pytest.mark.parametrize("proposer", ["q_learning", "random", "reinforced_merging", "coordinate_descent"])
def test_what_was_searched_is_what_is_written(experiment, proposer):
    searched = with_fuse(experiment, proposer=proposer, trials=8, rank=32)
    run = fuse_policies(searched)
    result = read_fusion(searched)
    table = pd.read_csv(run / "trials.csv")
    assert len(table) == result.trials == 8
    assert result.value == pytest.approx(table["value"].max())
    base = load_base(searched.base)
    policy = PeftModel.from_pretrained(base.model, str(run / "policy")).eval()
    data = load_prompts(searched.data, searched.seed, True).validation
    objectives = [load_objective(name, config) for name, config in searched.objectives.items()]
    found = evaluate(policy, base.tokenizer, data, objectives, searched.generation).table
    for name, score in result.scores.items():
        assert found[name].mean() == pytest.approx(score, abs=1e-6)
    card = (run / "policy" / "README.md").read_text()
    assert f"Chosen by {proposer} among 8 candidates, for a value of {result.value:.3f} on the validation prompts" in card
    assert f"On the test prompts, which the search did not see: e {result.test['e']:.3f}, a " in card
    if result.layers:
        assert set(", ".join(table["plan"]).split(", ")) <= {
            f"{n}{name}" for n in ("", "2 x ") for name in ("e", "a", "slerp", "ties")
        }


def test_an_interrupted_search_goes_on_and_a_finished_one_is_left(experiment):
    few = with_fuse(experiment, proposer="q_learning", trials=5)
    fuse_policies(few)
    journal = (few.output / "fuse" / "journal.log").stat().st_size
    fuse_policies(few)
    assert (few.output / "fuse" / "journal.log").stat().st_size == journal
    assert read_fusion(few).test.keys() == {"e", "a"}
    other = replace(few, output=few.output.parent / "other", policies=few.output)
    fuse_policies(other)
    assert read_fusion(other) == read_fusion(few)
    more = with_fuse(experiment, proposer="q_learning", trials=8)
    fuse_policies(more)
    assert read_fusion(more).trials == 8
    with pytest.raises(UserError, match="other settings"):
        fuse_policies(with_fuse(experiment, proposer="random", trials=5))


def test_a_moving_evaluation_set_is_resumed_and_reports_its_holdout(experiment, monkeypatch):
    data = Path(experiment.data.path)
    rows = [json.loads(line) for line in data.read_text().splitlines()] * 3
    lines = [{"prompt": f"{row['prompt']} {number}", "topic": "ab"[number % 2]} for number, row in enumerate(rows)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    strata = StrataConfig(column="topic", anchor=0.2, adaptive=0.5, every=3, floor=1)
    moving = with_fuse(
        replace(experiment, data=replace(experiment.data, validation=30, test=2)),
        proposer="q_learning",
        trials=12,
        strata=strata,
    )
    run = fuse_policies(moving)
    study = open_study(run / "journal.log", ["e", "a"], "fusion")
    sets = [trial.notes["set"] for trial in finished_trials(study)]
    assert sets[0]["version"] == 0
    assert sets[-1]["version"] > 0
    assert len({sum(one["counts"]) for one in sets}) == 1
    assert read_fusion(moving).holdout.keys() == read_fusion(moving).holdout_errors.keys() == {"e", "a"}

    stopped = replace(moving, output=moving.output.parent / "stopped", policies=moving.output)
    answered, calls = FusionEvaluator._answered, []

    def interrupted(self, fusion, rows):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return answered(self, fusion, rows)

    with monkeypatch.context() as patch:
        patch.setattr(FusionEvaluator, "_answered", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fuse_policies(stopped)
    fuse_policies(stopped)
    pd.testing.assert_frame_equal(*[
        pd.read_csv(one.output / "fuse" / "trials.csv").drop(columns=["trial", "seconds"]) for one in (moving, stopped)
    ])  # fmt: skip
    with pytest.raises(UserError, match=r"fuse.strata.column 'topc' is no column of the data; did you mean 'topic'"):
        fuse_policies(with_fuse(replace(moving, output=moving.output.parent / "x", policies=moving.output), proposer="random",
                                strata=StrataConfig(column="topc")))  # fmt: skip
    with pytest.raises(ValueError, match="decode greedily"):
        replace(moving, generation={"do_sample": True})


def test_given_settings_by_the_command_line(experiment, capsys, tmp_path):
    (tmp_path / "experiment.yaml").write_text(to_yaml(experiment))
    command = ["fuse", str(tmp_path / "experiment.yaml"), "fuse.method=task_arithmetic", "fuse.weights={e: 1}"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["method"], result["weights"]) == ("task_arithmetic", {"e": 1.0, "a": 0.0})
    fused, original = read_adapter(result["policy"]), read_adapter(Layout(experiment.output).policy("e"))
    for name, (a, b) in original.factors.items():
        torch.testing.assert_close(fused.factors[name][0] @ fused.factors[name][1], a @ b)


def test_a_finished_search_is_repeated_without_a_model(experiment, capsys, tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(to_yaml(with_fuse(experiment, proposer="coordinate_descent", trials=60)))
    assert main(["fuse", str(path), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["trials"] < first["budget"] == 60  # nothing better was left to try
    command = "import sys; from emorl.cli import main; main(sys.argv[1:]); assert not {'torch', 'optuna'} & set(sys.modules)"
    again = subprocess.run([sys.executable, "-c", command, "fuse", path, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(again.stdout) == first
    assert "finished before" in again.stderr
    assert main(["fuse", str(path), f"fuse.trials={first['trials']}"]) == 0
    assert f"best of {first['trials']} by coordinate_descent" in capsys.readouterr().out
    assert main(["fuse", str(path), "seed=1"]) == 2
    assert "holds a run with other settings (seed: 0 -> 1)" in capsys.readouterr().err


def test_the_fused_policy_answers_prompts(experiment, capsys, tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(to_yaml(with_fuse(experiment, weights={"e": 1})))
    assert main(["fuse", str(path)]) == 0
    shutil.rmtree(experiment.output / "train" / "a")  # the fused policy needs none of those it was made of
    policy = experiment.output / "fuse" / "policy"
    answers = []
    for folder in (experiment.output, policy, Layout(experiment.output).policy("e")):
        capsys.readouterr()
        assert main(["generate", str(folder), "--prompt", "say yes 1", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1] == {**answers[2], "policy": str(policy)}
    assert main(["generate", str(policy), "--prefer", "e=1", "--prompt", "say yes 1"]) == 2
    assert "is one policy, without a front to choose from; leave --prefer out" in capsys.readouterr().err


def test_a_fused_checkpoint_answers_prompts(experiment, capsys, tmp_path):
    base = Path(experiment.base.model)
    file = {"output": str(tmp_path / "fused"), "models": {"one": str(base), "two": str(base)}}
    (tmp_path / "checkpoints.yaml").write_text(yaml.safe_dump(file))
    assert main(["fuse", str(tmp_path / "checkpoints.yaml")]) == 0
    lines = []
    for folder in (base, tmp_path / "fused"):
        capsys.readouterr()
        assert main(["generate", str(folder), "--prompt", "say yes 1"]) == 0
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1]


def test_mistakes_are_one_line(experiment, capsys, tmp_path):
    with pytest.raises(UserError, match="no proposer is called 'q_learnin'; did you mean 'q_learning'"):
        fuse_policies(with_fuse(experiment, proposer="q_learnin"))
    with pytest.raises(UserError, match="no fusion method is called 'tie'"):
        fuse_policies(with_fuse(experiment, proposer="random", methods=["tie"]))
    with pytest.raises(UserError, match=r"fuse.weights names 'b'"):
        fuse_policies(with_fuse(experiment, weights={"b": 1}))
    with pytest.raises(UserError, match="no trained policy for e"):
        fuse_policies(replace(experiment, output=tmp_path / "nowhere"))
    (tmp_path / "checkpoints.yaml").write_text(yaml.safe_dump({"output": "x", "models": {"a": "y"}}))
    assert main(["fuse", str(tmp_path / "checkpoints.yaml"), "--proposer", "random"]) == 2
    assert "searches the fusion of an experiment's policies" in capsys.readouterr().err


@pytest.mark.parametrize("method", [name for name in OPERATORS if name != "keep"])
def test_a_loaded_model_is_fused_in_place_and_only_where_something_changed(make_causal_model, method):
    base, *models = [make_causal_model("llama", seed=seed) for seed in range(3)]
    states = [{name: value.clone() for name, value in model.state_dict().items()} for model in (base, *models)]
    loaded = loaded_models(base, states[1:], states[0], seed=4)
    weights = (0.5, 0.5)
    assert loaded.apply(lambda name: Fusion(method, weights)) == len(loaded.names)
    assert loaded.apply(lambda name: Fusion(method, weights)) == 0
    first = {name: value.clone() for name, value in base.named_parameters()}
    inside = [name for name in loaded.names if "layers.1." in name]
    keep = Fusion("keep", (0.0, 1.0))
    assert loaded.apply(lambda name: keep if name in inside else Fusion(method, weights)) == len(inside)
    for name, value in base.named_parameters():
        assert torch.equal(value, states[2][name] if name in inside else first[name]), name


def test_a_loaded_model_in_bfloat16_gets_the_rounded_fusion(make_causal_model):
    merged, *models = [make_causal_model("llama", seed=seed).bfloat16() for seed in range(3)]
    loaded_models(merged, [model.state_dict() for model in models]).apply(lambda name: Fusion("linear", (0.25, 0.75)))
    one, two = (dict(model.named_parameters()) for model in models)
    for name, value in merged.named_parameters():
        assert torch.equal(value, (0.25 * one[name].float() + 0.75 * two[name].float()).bfloat16()), name


def test_loaded_adapters_equal_the_written_one(experiment):
    base = load_base(experiment.base)
    adapters = [read_adapter(Layout(experiment.output).policy(name)) for name in "ea"]
    alone = PeftModel.from_pretrained(load_base(experiment.base).model, str(adapters[0].path)).eval()
    inputs = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = alone(inputs).logits
        loaded = loaded_adapters(base.model, adapters)
        loaded.apply(lambda name: Fusion("linear", (1.0, 0.0)))
        torch.testing.assert_close(loaded.model(inputs).logits, expected, atol=1e-4, rtol=1e-4)
