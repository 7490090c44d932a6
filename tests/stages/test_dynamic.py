"""`emorl dynamic` from its experiment file to an answer: training, resuming, comparison, the artifact, two processes."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("torchrl", reason="needs the extra rl")

from emorl import cli
from emorl.config import UserError
from emorl.config.experiment import Experiment, load_experiment
from emorl.dynamic.agents import ppo
from emorl.dynamic.agents.observation import FixedWeights
from emorl.dynamic.engines import loading
from emorl.dynamic.engines.engine import decoding_of
from emorl.dynamic.ensemble import DynamicEnsemble
from emorl.dynamic.models import check_together
from emorl.dynamic.rivals import best_of, paired_gain, weight_grid
from emorl.policies.base import load_base
from emorl.runs.layout import Layout
from emorl.runs.results import FixedPoint, FixedResult, best_dynamic_ensemble, read_result
from emorl.stages.dynamic import models_of, read_dynamic
from emorl.stages.stage import perform


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_base_dir: Path, write_adapter: Callable[..., Path]) -> Path:
    """Adapters, prompts, and an experiment that takes seconds."""
    root = tmp_path_factory.mktemp("dynamic")
    base = load_base(load_experiment(_experiment(root, tiny_base_dir)).base).model
    for seed, name in enumerate("ab"):
        write_adapter(base, root / name, seed=seed)
    rows = [{"prompt": f"Tell me about the number {number}, please."} for number in range(40)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def _experiment(root: Path, base: Path) -> Path:
    file = root / "experiment.yaml"
    file.write_text(
        f"""
output: {root}/run
base: {{model: {base}}}
data: {{path: {root}/prompts.jsonl, validation: 6, test: 6}}
objectives: {{varied: distinct_2}}
generation: {{max_new_tokens: 12}}
dynamic:
  models: {{a: {root}/a, b: {root}/b}}
  span: 4
  spans: [4, 8]
  fixed_step: 0.5
  agent: {{hidden: 8}}
  ppo: {{updates: 4, prompts: 6, checkpoint: 2}}
"""
    )
    return file


@pytest.fixture(scope="module")
def finished(folder: Path) -> Experiment:
    experiment = load_experiment(folder / "experiment.yaml")
    perform("dynamic", experiment)
    return experiment


def test_the_comparison_has_all_rivals(finished: Experiment) -> None:
    result = read_dynamic(finished.output)
    names = [system.name for system in result.systems]
    rivals = ["a alone", "b alone", "equal weights", "best fixed weights", "router per prompt", "oracle router"]
    assert sorted(names) == sorted([*rivals, "RLAE-PPO", "RLAE-MAPPO", f"RLAE-{result.best.upper()}"])
    assert names[: len(rivals)] == rivals
    by_name = {system.name: system for system in result.systems}
    assert by_name["best fixed weights"].gain == 0
    assert by_name["oracle router"].value >= max(by_name["a alone"].value, by_name["b alone"].value)
    assert all(system.tokens_per_second > 0 for name, system in by_name.items() if name != "oracle router")
    assert by_name["a alone"].mean_weights == {"a": 1, "b": 0}


def test_the_best_fixed_weights_are_the_best_of_those_that_were_tried(finished: Experiment) -> None:
    fixed = read_result(FixedResult, finished.output / "dynamic" / "fixed")
    assert len(fixed.tried) == 3
    assert fixed.best == max(fixed.tried, key=lambda point: point.validation)
    assert read_dynamic(finished.output).fixed == fixed.best


def test_answers_are_kept_with_their_weights(finished: Experiment) -> None:
    answers = pd.read_parquet(finished.output / "dynamic" / "comparison" / "answers.parquet")
    assert set(answers.groupby(["system", "span"]).size()) == {6}
    spans = answers[(answers["system"] == "RLAE-PPO") & (answers["span"] == "4")]
    for _, answer in spans.iterrows():
        assert len(answer["weights"]) == -(-answer["tokens"] // 4)
        for weights in answer["weights"]:
            assert sum(weights) == pytest.approx(1, abs=1e-5)


def test_a_saved_ensemble_answers_as_before_also_where_it_was_moved(finished: Experiment, tmp_path: Path) -> None:
    directory = best_dynamic_ensemble(Layout(finished.output))
    assert directory is not None
    prompts = ["Tell me a story.", "And now?"]
    first = DynamicEnsemble.from_pretrained(directory)
    again = DynamicEnsemble.from_pretrained(directory)
    assert first.generate(prompts) == again.generate(prompts)
    assert [answer.text for answer in first.generate(prompts[:1])] == [first.generate(prompts)[0].text]
    assert len(first.generate(prompts, max_new_tokens=3)[0].weights) == 1
    first.save_pretrained(tmp_path / "copy")
    moved = DynamicEnsemble.from_pretrained(tmp_path / "copy")
    assert moved.generate(prompts) == first.generate(prompts)


def test_a_finished_run_is_skipped_and_other_settings_are_refused(finished: Experiment) -> None:
    before = (finished.output / "dynamic" / "comparison" / "result.json").stat().st_mtime_ns
    perform("dynamic", finished)
    assert (finished.output / "dynamic" / "comparison" / "result.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other settings"):
        perform("dynamic", replace(finished, seed=5))


def test_an_interrupted_training_goes_on_to_the_same_agent(
    finished: Experiment, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = load_experiment(folder / "experiment.yaml", [f"output={folder}/interrupted", "dynamic.agents=[ppo]"])
    learn, calls = ppo.Learner.learn, []

    def failing(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return learn(self, *arguments)

    monkeypatch.setattr(ppo.Learner, "learn", failing)
    with pytest.raises(KeyboardInterrupt):
        perform("dynamic", experiment)
    monkeypatch.undo()
    perform("dynamic", experiment)
    whole, resumed = (output / "dynamic" / "ppo" / "log.jsonl" for output in (finished.output, experiment.output))
    assert resumed.read_text() == whole.read_text()
    assert len(whole.read_text().splitlines()) == 4


def test_the_command_line_trains_and_answers(finished: Experiment, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dynamic", str(folder / "experiment.yaml")]) == 0
    assert "| RLAE-PPO | 4 |" in capsys.readouterr().out
    assert cli.main(["generate", str(best_dynamic_ensemble(Layout(finished.output))), "--json", "--prompt", "Hello"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {"prompt", "completion", "tokens", "weights"}
    assert set(said["weights"][0]) == {"a", "b"}


def test_two_processes_share_the_texts_and_find_the_same(finished: Experiment, folder: Path) -> None:
    output = folder / "distributed"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29731", "-m", "emorl"]
    arguments = ["dynamic", str(folder / "experiment.yaml"), f"output={output}", "dynamic.agents=[ppo]", "--json"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    alone = [json.loads(line) for line in (finished.output / "dynamic" / "ppo" / "log.jsonl").read_text().splitlines()]
    shared = [json.loads(line) for line in (output / "dynamic" / "ppo" / "log.jsonl").read_text().splitlines()]
    for first, second in zip(alone, shared, strict=True):
        assert second == pytest.approx(first, abs=1e-4)


def test_the_grid_has_single_models_first_and_each_point_once() -> None:
    grid = weight_grid(3, 0.25)
    assert grid[:4].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], pytest.approx([1 / 3] * 3)]
    assert len(grid) == 16
    assert len(grid.unique(dim=0)) == 16
    assert torch.allclose(grid.sum(1), torch.ones(16))
    tried = [FixedPoint({"a": a}, value) for a, value in ((1.0, 0.5), (0.5, 1.0), (0.0, 1.0))]
    assert best_of(tried) == FixedPoint({"a": 0.5}, 1.0)  # the first of equals


def test_wrong_settings_are_refused_in_one_line(folder: Path, tiny_base_dir: Path) -> None:
    experiment = load_experiment(folder / "experiment.yaml")
    with pytest.raises(UserError, match=r"num_beams.*decodes greedily or samples"):
        decoding_of({"num_beams": 4}, 0)
    mixed = replace(experiment, dynamic=replace(experiment.dynamic, models={"a": str(folder / "a"), "c": str(tiny_base_dir)}))
    with pytest.raises(UserError, match="give adapters only, or whole models only"):
        check_together(models_of(mixed))
    base = replace(experiment.base, model=load_base(experiment.base).model)
    with pytest.raises(UserError, match="refers to its base and tokenizer"):
        perform("dynamic", replace(experiment, output=folder / "x", base=base))
    with pytest.raises(UserError, match="no dynamic ensemble"):
        DynamicEnsemble.from_pretrained(folder)
    with pytest.raises(UserError, match=r"expected at least 1 token or 'turn'"):
        load_experiment(folder / "experiment.yaml", ["dynamic.span=0"])
    with pytest.raises(UserError, match="chebyshev is no reward"):
        perform("dynamic", load_experiment(folder / "experiment.yaml", [f"output={folder}/x", "value.scalarize=chebyshev"]))


def test_an_ensemble_of_fixed_weights_cannot_be_saved(finished: Experiment, tmp_path: Path) -> None:
    directory = best_dynamic_ensemble(Layout(finished.output))
    assert directory is not None
    loaded = DynamicEnsemble.from_pretrained(directory)
    fixed = DynamicEnsemble(loaded.engine, FixedWeights(torch.tensor([0.5, 0.5])), loaded.decoding, models=loaded.models)
    with pytest.raises(ValueError, match="Only an ensemble with a SpanAgent"):
        fixed.save_pretrained(tmp_path / "fixed")
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_whole_models_with_tokenizers_of_their_own_write_together(folder: Path, tiny_base_dir: Path, tmp_path: Path) -> None:
    """The same steps for the union of vocabularies, here of one and the same model and another one."""
    other = shutil.copytree(tiny_base_dir, tmp_path / "other")
    models = f"dynamic.models={{one: {tiny_base_dir}, two: {other}}}"
    few = ["dynamic.agents=[mappo]", "dynamic.ppo.updates=1", "dynamic.spans=[4]", "dynamic.vocabulary=full"]
    perform("dynamic", load_experiment(folder / "experiment.yaml", [f"output={tmp_path}/run", models, *few]))
    systems = {system.name: system for system in read_dynamic(tmp_path / "run").systems}
    assert systems["one alone"].value == systems["two alone"].value == systems["equal weights"].value
    directory = best_dynamic_ensemble(Layout(tmp_path / "run"))
    assert directory is not None
    assert DynamicEnsemble.from_pretrained(directory).engine.names == ("one", "two")


def test_dialogues_are_answered_turn_by_turn_with_weights_for_each_turn(folder: Path, tmp_path: Path) -> None:
    said = [[f"I am number {number}.", "And you?", "Good night."][: 1 + number % 3] for number in range(20)]
    answered = {"role": "assistant", "content": "…"}
    rows = [
        {"prompt": [turn for text in texts for turn in ({"role": "user", "content": text}, answered)][:-1]} for texts in said
    ]
    (tmp_path / "dialogues.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = ["dynamic.agents=[ppo]", "dynamic.ppo.updates=1", "dynamic.turns=all", "dynamic.span=turn", "dynamic.spans=[]"]
    overrides = [f"output={tmp_path}/run", f"data.path={tmp_path}/dialogues.jsonl", *few]
    perform("dynamic", load_experiment(folder / "experiment.yaml", overrides))
    answers = pd.read_parquet(tmp_path / "run" / "dynamic" / "comparison" / "answers.parquet")
    own = answers[answers["system"] == "RLAE-PPO"]
    assert own.groupby("prompt_index")["turn"].max().nunique() > 1
    assert all(len(weights) == 1 for weights in own["weights"])
    assert "And you?" in own[own["turn"] == 1]["prompt"].iloc[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=missing.jsonl"], "missing.jsonl: no such file"),
        (["generation.num_beams=4"], "generation.num_beams"),
        (["generation={max_new_tokens: 4, temperature: null}"], "generation.temperature: expected a number"),
        (["dynamic.agent.encoder=no/such"], "dynamic.agent.encoder 'no/such'"),
        (["value.scalarize=chebyshev"], "chebyshev is no reward"),
        (["dynamic.models={a: no/such, b: no/other}"], "dynamic.models.a 'no/such'"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.setattr(loading, "load_engine", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=re.escape(message)):
        perform("dynamic", load_experiment(folder / "experiment.yaml", [f"output={tmp_path}/run", *overrides]))


def test_more_updates_go_on_from_a_finished_training(finished: Experiment, folder: Path, tmp_path: Path) -> None:
    output = shutil.copytree(finished.output, tmp_path / "run")
    options = [f"output={output}", "dynamic.agents=[ppo, mappo]", "dynamic.ppo.updates=6"]
    before = (output / "dynamic" / "ppo" / "log.jsonl").read_text()
    perform("dynamic", load_experiment(folder / "experiment.yaml", options))
    after = (output / "dynamic" / "ppo" / "log.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 6
    assert read_dynamic(output).updates == 6


def test_evaluate_and_generate_take_a_run_without_a_search(
    finished: Experiment, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", str(folder / "experiment.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["objectives"] == ["varied"]  # strict JSON: no NaN
    assert cli.main(["generate", str(finished.output), "--prompt", "Hello"]) == 0
    capsys.readouterr()
    shorter = ["generation.max_new_tokens=3", "generation.do_sample=false", "--json"]
    assert cli.main(["generate", str(finished.output), "--prompt", "Hello", *shorter]) == 0
    answered = json.loads(capsys.readouterr().out)
    assert 1 <= answered["tokens"] <= 3
    assert cli.main(["generate", str(finished.output), "--prompt", "Hello", "generation.num_beams=2"]) == 2


def test_the_system_prompt_of_the_training_is_asked_with(finished: Experiment, tmp_path: Path) -> None:
    directory = best_dynamic_ensemble(Layout(finished.output))
    assert directory is not None
    ensemble = DynamicEnsemble.from_pretrained(directory)
    assert ensemble.as_prompt("Hi") == [{"role": "user", "content": "Hi"}]
    assert ensemble.models is not None
    ensemble.models = replace(ensemble.models, system_prompt="Be brief.")
    ensemble.save_pretrained(tmp_path / "brief")
    brief = DynamicEnsemble.from_pretrained(tmp_path / "brief")
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert brief.as_prompt("Hi") == asked
    assert brief.generate(["Hi"]) == brief.generate([asked])


def test_a_text_is_one_user_turn_of_a_chat_model_and_is_answered(finished: Experiment) -> None:
    directory = best_dynamic_ensemble(Layout(finished.output))
    assert directory is not None
    ensemble = DynamicEnsemble.from_pretrained(directory)
    turn = [{"role": "user", "content": "I cannot sleep."}]
    [answer] = ensemble.generate(["I cannot sleep."])
    assert answer == ensemble.generate([turn])[0]
    assert answer.prompt == turn
    assert answer.text
    texts = [each.text for each in ensemble.generate([turn, "I cannot sleep."])]  # both kinds in one batch
    assert texts == [answer.text] * 2


def test_the_interval_of_a_gain_is_that_of_its_prompts() -> None:
    assert paired_gain(np.arange(5.0) + 0.5, np.arange(5.0)) == (0.5, 0.5, 0.5)
    gain, low, high = paired_gain(np.array([0.0, 1.0]), np.zeros(2))
    assert (gain, low, high) == (0.5, 0, 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["value.scalarize=chebyshev"], "chebyshev is no reward"),
        (["dynamic.models={a: FOLDER/a, c: FOLDER}"], "give adapters only, or whole models only"),
        (["dynamic.models={}"], "at least two models, and here is varied"),
        (["dynamic.ppo.clip=0.5"], "holds a run with other settings (dynamic.ppo.clip: 0.2 -> 0.5)"),
    ],
)
def test_cheap_mistakes_are_found_without_torch(
    finished: Experiment, folder: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    settings = [override.replace("FOLDER", str(folder)) for override in overrides]
    if "no trained" in message or "at least" in message:
        (tmp_path / "train" / "varied" / "policy").mkdir(parents=True)
        (tmp_path / "train" / "varied" / "policy" / "adapter_config.json").write_text("{}")
        settings.append(f"policies={tmp_path}")
    program = (
        "import sys\nfrom pathlib import Path\nfrom emorl.config import UserError\n"
        "from emorl.config.experiment import load_experiment\nfrom emorl.stages import dynamic\n"
        f"try:\n    dynamic.check(load_experiment(Path({str(folder / 'experiment.yaml')!r}), {settings!r}))\n"
        "except UserError as error:\n    print(error, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert message in done.stdout, done.stderr
    assert done.stdout.strip().endswith("False")
