"""`emorl distill`: one ordinary adapter at chosen weights, or one for the whole front that its prompt tells the weights."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from emorl.cli import main
from emorl.config import UserError
from emorl.config.distill import DistillConfig
from emorl.config.experiment import (
    BaseConfig,
    DataConfig,
    EnsembleConfig,
    EvaluateConfig,
    Experiment,
    ObjectiveConfig,
    SearchConfig,
)
from emorl.config.train import TrainConfig
from emorl.config.yaml import to_yaml
from emorl.policies.preference_line import PreferenceLine
from emorl.policies.prompts import decode, encode
from emorl.reporting.report import write_report
from emorl.reporting.results import load_run
from emorl.runs.layout import ENSEMBLE, Layout
from emorl.runs.results import DistillationResult, Kind, Point, SearchResult, as_json, read_result, write_result
from emorl.runs.run import read_cost
from emorl.stages.distill import trade_offs
from emorl.stages.evaluate import systems_of
from emorl.stages.materials import Materials
from emorl.stages.stage import keep_experiment, perform

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL 1.16 uses names that transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
FRONT = [
    Point({"brief": 0.0, "varied": 1.0}, {"brief": 0.2, "varied": 0.9}, 0.55),
    Point({"brief": 0.6, "varied": 0.4}, {"brief": 0.7, "varied": 0.5}, 0.6),
]
TRAINER = {"max_steps": 3, "eval_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2}


@pytest.fixture
def experiment(tmp_path, tiny_base_dir, make_causal_model, write_adapter):
    """Policies and what a search found of them."""
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {word} {i}"}) + "\n" for i in range(8) for word in ("yes", "no")))
    made = Experiment(
        output=tmp_path / "run",
        base=BaseConfig(model=str(tiny_base_dir)),
        data=DataConfig(path=str(data), validation=4, test=4),
        objectives={"brief": ObjectiveConfig(function="length"), "varied": ObjectiveConfig(function="distinct_2")},
        generation={"max_new_tokens": 8, "do_sample": False},
        train=TrainConfig(lora={"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
        evaluate=EvaluateConfig(attacks=False),
        distill=DistillConfig(trainer=TRAINER),
    )
    for seed, name in enumerate(made.objectives):
        write_adapter(make_causal_model("llama"), Layout(made.output).policy(name), seed=seed)
    keep_experiment(made)
    search = Layout(made.output).search
    search.mkdir()
    Materials(made).mixture().save_pretrained(search / ENSEMBLE)
    (search / "run.json").write_text(json.dumps({"stage": "search", "finished": True, "config": {}, "versions": {}}))
    write_result(search, SearchResult("hierarchical_grid", "mean", {}, 2, None, best=FRONT[1], front=FRONT))
    return made


def with_block(experiment, **block):
    return replace(experiment, distill=replace(experiment.distill, **block))


def written(experiment):
    file = experiment.output.parent / "experiment.yaml"
    file.write_text(to_yaml(experiment))
    return str(file)


def weights_of(folder: Path):
    return load_file(folder / "policy" / "adapter_model.safetensors")


def test_the_best_point_becomes_an_ordinary_adapter_with_what_it_keeps(experiment, tiny_base_dir):
    result = perform("distill", experiment)
    folder = Layout(experiment.output).distillation
    assert [one.weights for one in result.trade_offs] == [FRONT[1].weights]
    assert set(result.trade_offs[0].scores) == {"ensemble", "soup", "distilled"}
    assert result.trade_offs[0].divergence["ensemble"] == pytest.approx(0, abs=1e-6)
    assert result.trade_offs[0].divergence["soup"] > 0.01
    assert set(result.kept) == {"divergence", "value", "score brief", "score varied"}
    soup, distilled = (result.trade_offs[0].divergence[name] for name in ("soup", "distilled"))
    assert result.kept["divergence"].share == pytest.approx(1 - distilled / soup)
    cost = read_cost(folder)
    assert cost.completions == 12 + 3 * 4  # 3 steps of 4 answers; then three systems on 4 test prompts, under 2 objectives
    assert cost.reward_calls == 3 * 4 * 2
    base = AutoModelForCausalLM.from_pretrained(tiny_base_dir)
    loaded, tokenizer = PeftModel.from_pretrained(base, folder / "policy").eval(), Materials(experiment).tokenizer
    table = pd.read_parquet(next((folder / "systems").glob("best-found-distilled-*")))
    for row in table.itertuples():
        inputs = encode(tokenizer, [[{"role": "user", "content": row.prompt}]])
        ids = loaded.generate(**inputs, **experiment.generation)[:, inputs["input_ids"].shape[1] :]
        assert decode(tokenizer, ids) == [row.completion]


def test_a_finished_one_is_read_and_an_interrupted_one_goes_on(experiment):
    first = perform("distill", experiment)
    folder = Layout(experiment.output).distillation
    kept = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}
    assert as_json(perform("distill", experiment)) == as_json(first)
    assert kept == {file: file.stat().st_mtime_ns for file in kept}
    calm = weights_of(folder)
    for left in ("result.json", "distilled.json", "policy", "systems", "checkpoints/checkpoint-3"):  # as a kill may leave it
        place = folder / left
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    again = perform("distill", experiment)
    assert {key: value for key, value in as_json(again).items() if key != "log"} == {
        key: value for key, value in as_json(first).items() if key != "log"
    }
    assert all(torch.equal(value, calm[name]) for name, value in weights_of(folder).items())


def test_weights_that_a_search_has_left_are_distilled_anew(experiment):
    perform("distill", experiment)
    layout = Layout(experiment.output)
    before = weights_of(layout.distillation)
    write_result(layout.search, SearchResult("hierarchical_grid", "mean", {}, 3, None, best=FRONT[0], front=FRONT))
    result = perform("distill", experiment)
    assert result.trade_offs[0].weights == FRONT[0].weights
    assert len(list((layout.distillation / "systems").iterdir())) == 3  # nothing of the former adapter
    assert not all(torch.equal(value, before[name]) for name, value in weights_of(layout.distillation).items())


def test_a_preference_or_weights_choose_the_trade_off(experiment):
    assert trade_offs(with_block(experiment, prefer={"varied": 1.0}))[0].weights == FRONT[0].weights
    other = replace(
        with_block(experiment, prefer={"varied": 1.0}), output=experiment.output / "other", policies=experiment.output
    )
    assert trade_offs(other)[0].weights == FRONT[0].weights  # the search of the output whose policies are used
    given = trade_offs(with_block(experiment, weights={"varied": 3.0, "brief": 1.0}))
    assert given[0].weights == {"brief": 0.25, "varied": 0.75}
    shutil.rmtree(Layout(experiment.output).search)
    assert trade_offs(with_block(experiment, weights={"brief": 1.0}))[0].weights == {"brief": 1.0, "varied": 0.0}  # no search


def test_all_weight_on_one_policy_is_that_policy_and_stays_it(experiment):
    """Its soup is the policy itself, of the student's own rank: nothing to learn, and the start is kept."""
    result = perform("distill", with_block(experiment, weights={"varied": 1.0}))
    assert result.first_divergence == pytest.approx(0, abs=1e-6)
    assert result.kept_energy == pytest.approx(1)
    [one] = result.trade_offs
    assert one.divergence["distilled"] < 1e-5
    assert one.scores["distilled"] == one.scores["ensemble"] == one.scores["soup"]
    assert result.kept["divergence"].gain == pytest.approx(0, abs=1e-6)
    assert result.kept["value"].share is None


def test_the_student_begins_as_it_is_told(experiment):
    equal, found = {"brief": 0.5, "varied": 0.5}, {}
    for start in ("soup", "base", "varied"):
        asked = with_block(experiment, start=start, weights=equal)
        found[start] = perform("distill", replace(asked, output=experiment.output / start, policies=experiment.output))
    assert {start: result.start for start, result in found.items()} == {start: start for start in found}
    assert (
        found["soup"].kept_energy < 1 == found["base"].kept_energy == found["varied"].kept_energy
    )  # rank 8 in an adapter of 4
    assert len({round(result.first_divergence, 6) for result in found.values()}) == 3


def test_the_base_may_take_part(experiment):
    with_base = replace(experiment, ensemble=EnsembleConfig(include_base=True))
    result = perform("distill", with_block(with_base, weights={"base": 1.0, "brief": 1.0}))
    assert result.trade_offs[0].weights == {"brief": 0.5, "varied": 0.0, "base": 0.5}


@pytest.fixture
def whole_front(experiment):
    asked = with_block(experiment, front=True, held_out=3)
    keep_experiment(asked)
    return asked, perform("distill", asked)


def test_one_adapter_for_the_whole_front_reports_held_out_preferences_apart(whole_front):
    experiment, result = whole_front
    trained = [one.weights for one in result.trade_offs if not one.held_out]
    held_out = [one.weights for one in result.trade_offs if one.held_out]
    assert trained == [{"brief": 0.6, "varied": 0.4}, {"brief": 0.0, "varied": 1.0}]
    assert len(held_out) == 3
    for one in result.trade_offs:
        assert one.divergence["ensemble"] == pytest.approx(0, abs=1e-6)  # it is asked without the line
        single = max(one.weights.values()) == 1
        assert (one.divergence["soup"] < 1e-6) == single
        assert one.divergence["distilled"] > 0.01
    assert result.kept == {}
    assert set(result.hypervolume) == {"ensemble", "soup", "distilled"}
    assert list(result.follows) == ["brief", "varied"]
    line = PreferenceLine.read(Layout(experiment.output).distillation / "policy")
    assert line == PreferenceLine("Priorities: {weights}.", ("brief", "varied"), True)


def asked_by_hand(experiment, told, prompt="say yes"):
    """What the adapter answers to a prompt with the line written into it."""
    base = AutoModelForCausalLM.from_pretrained(experiment.base.model)
    policy = PeftModel.from_pretrained(base, Layout(experiment.output).distillation / "policy").eval()
    turns = [{"role": "system", "content": told}, {"role": "user", "content": prompt}]
    inputs = encode(Materials(experiment).tokenizer, [turns])
    ids = policy.generate(**inputs, **experiment.generation)[:, inputs["input_ids"].shape[1] :]
    return decode(Materials(experiment).tokenizer, ids)[0]


def test_generate_tells_the_adapter_what_is_preferred(whole_front, capsys):
    experiment, _ = whole_front
    layout = Layout(experiment.output)

    def ask(*options, of=layout.output):
        capsys.readouterr()
        assert main(["generate", str(of), "--prompt", "say yes", "--json", *options]) == 0
        captured = capsys.readouterr()
        return json.loads(captured.out), captured.err.splitlines()[0]

    best, said = ask()
    assert best["weights"] == FRONT[1].weights
    assert said == "told: Priorities: brief 60 %, varied 40 %."
    assert best["completion"] == asked_by_hand(experiment, "Priorities: brief 60 %, varied 40 %.")
    preferred, said = ask("--prefer", "varied=1")
    assert preferred["weights"] == FRONT[0].weights
    assert said == "told: Priorities: brief 0 %, varied 100 %."
    assert preferred["completion"] == asked_by_hand(experiment, "Priorities: brief 0 %, varied 100 %.")
    given, said = ask("--weights", "brief=1,varied=3", of=layout.distillation / "policy")
    assert said == "told: Priorities: brief 25 %, varied 75 %."
    assert given["completion"] == asked_by_hand(experiment, "Priorities: brief 25 %, varied 75 %.")
    assert set(given) == {"prompt", "completion", "policy", "weights"}  # scores of the front are the ensemble's
    write_result(layout.search, SearchResult("hierarchical_grid", "mean", {}, 3, None, best=FRONT[0], front=FRONT[:1]))
    assert main(["generate", str(layout.output), "--prompt", "x"]) == 0
    assert "has gone on since; `emorl distill` makes the adapter anew" in capsys.readouterr().err
    _, said = ask("--ensemble", "--prefer", "varied=1")
    assert said == "weights: brief 0, varied 1"
    assert main(["generate", str(layout.output), "--prompt", "x", "--prefer", "varid=1"]) == 2
    assert "did you mean 'varied'" in capsys.readouterr().err


def test_a_lone_distilled_policy_answers(experiment, capsys):
    shutil.rmtree(Layout(experiment.output).search)
    given = with_block(experiment, weights={"brief": 1.0})
    perform("distill", given)
    capsys.readouterr()
    assert main(["generate", str(experiment.output), "--prompt", "say yes"]) == 0
    assert "one policy answers" in capsys.readouterr().err
    for place in (experiment.output, Layout(experiment.output).distillation / "policy"):
        assert main(["generate", str(place), "--prompt", "say yes", "--ensemble"]) == 2
        assert "--ensemble: no search has finished in" in capsys.readouterr().err


def test_evaluation_and_report_show_what_was_distilled(experiment):
    shutil.rmtree(Layout(experiment.output).search)  # whose trials were never there
    experiment = replace(with_block(experiment, front=True, held_out=3), search=SearchConfig(levels=2))
    perform("search", experiment)
    result = perform("distill", experiment)
    trained = [one for one in result.trade_offs if not one.held_out]
    evaluated = perform("evaluate", experiment)
    systems = [system for system in evaluated.systems if system.kind == Kind.DISTILLED]
    assert [system.name for system in systems] == [f"distilled, {one.name}" for one in trained]
    run = load_run(experiment.output)
    assert run.summary is not None
    scores = run.summary.set_index("system")
    for one in trained:
        assert scores.loc[f"distilled, {one.name}", "varied"] == pytest.approx(one.scores["distilled"]["varied"])
    assert evaluated.hypervolume["distilled adapter"] > 0
    longer = replace(experiment, generation={"max_new_tokens": 9, "do_sample": False})
    assert not [system for system in systems_of(longer) if system.kind == Kind.DISTILLED]  # it was not asked that
    assert "distill" in run.ran
    assert run.costs.loc["distill", "completions"] == 12 + 3 * 4 * len(result.trade_offs)
    page = write_report(experiment.output).read_text()
    assert "One adapter" in page
    assert "held out 3" in page


def test_the_command_prints_tables_or_json(experiment, capsys):
    arguments = ["distill", written(experiment), "--prefer", "varied=1"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "| KL from ensemble |" in shown.out
    assert "the adapter is in" in shown.err
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert Path(found["policy"], "adapter_config.json").is_file()
    assert read_result(DistillationResult, Layout(experiment.output).distillation).trade_offs[0].weights == FRONT[0].weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["distill.weights={bried: 1}"], "no policy is called 'bried'; did you mean 'brief'"),
        (["distill.prefer={varid: 1}"], "varid"),
        (["distill.start=sup"], "expected soup, base or a policy, got 'sup'; did you mean 'soup'"),
        (["distill.weights={brief: 1}", "distill.front=true"], "give one of the three"),
        (["distill.weights={brief: -1}"], "must not be negative"),
        (["distill.line=Weights"], "line must hold {weights} or {words} once"),
        (["distill.trainer.max_step=3"], "unknown key 'distill.trainer.max_step'"),
        (["distill.trainer.lr_scheduler_type=nothing"], "distill.trainer"),
        (["ensemble.aggregate=parameters"], "is one adapter already"),
        (["output=elsewhere"], "no search has finished in elsewhere; run `emorl search` first"),
        (["policies=run", "output=elsewhere", "ensemble.include_base=true"], "was over brief, varied, not brief, varied, base"),
        (["train.mode=uniform"], "trains one policy"),
    ],
)
def test_mistakes_are_one_line_before_a_model_loads(experiment, capsys, monkeypatch, changes, message):
    monkeypatch.chdir(experiment.output.parent)
    assert main(["distill", written(experiment), *changes]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_encoder_decoder_is_refused(experiment, tiny_seq2seq_dir):
    asked = replace(experiment, base=BaseConfig(model=str(tiny_seq2seq_dir)))
    with pytest.raises(UserError, match="TRL distils decoders only"):
        perform("distill", asked)


def test_two_processes_distil_as_one_and_write_once(experiment):
    """`torchrun` on CPU: half as many answers in each give the divergence of one process, up to which answers are sampled."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29751", "-m", "emorl"]
    settings = ["distill.trainer.per_device_train_batch_size=2", "distill.trainer.max_steps=2"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "distill", written(experiment), *settings, "--json"],
        capture_output=True, text=True, env=environment, cwd=experiment.output.parent, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["answers_per_step"] == 4
    assert found["steps"] == 2
    assert read_cost(Layout(experiment.output).distillation).completions == 8 + 3 * 4
    assert np.isfinite(found["trade_offs"][0]["divergence"]["distilled"])
