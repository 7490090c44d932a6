"""The seam of all stages: what is loaded once, what is answered from disk, and experiments made of objects."""

import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import emorl
import emorl.data
import emorl.objectives.loading
import emorl.policies.base
from emorl import HiddenStateEnsemble, UserError, load_run, perform
from emorl.config.experiment import BaseConfig, Experiment, load_experiment
from emorl.config.yaml import to_yaml
from emorl.runs.progress import Silent
from emorl.runs.results import SearchResult
from emorl.stages.materials import Materials
from emorl.stages.run import run_all
from emorl.stages.stage import Stage, identity

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL's and PEFT's own
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
TRAIN = {"grpo": {"max_steps": 1, "eval_steps": 1, "per_device_train_batch_size": 4, "num_generations": 2}}


def politeness(prompts, completions, **columns):
    return [str(completion).count("e") / 10 for completion in completions]


class Listener(Silent):
    def __init__(self):
        self.said, self.warned = [], []

    def say(self, line):
        self.said.append(line)

    def warn(self, line):
        self.warned.append(line)


@pytest.fixture
def experiment(tmp_path, tiny_base_dir):
    (tmp_path / "prompts.csv").write_text("prompt\n" + "\n".join(f"say {i}" for i in range(20)))
    return Experiment(
        output=tmp_path / "run",
        base=str(tiny_base_dir),
        data={"path": str(tmp_path / "prompts.csv"), "validation": 2, "test": 2},
        objectives={"polite": f"{__name__}:politeness", "varied": "distinct_2"},
        generation={"max_new_tokens": 4},
        train=TRAIN,
        search={"levels": 1},
    )


def test_a_run_reads_the_prompts_loads_the_base_and_each_objective_once(experiment, monkeypatch, capsys):
    """But for training, which changes its base: one more for each policy."""
    loaded = Counter()

    def counted(module, name, what):
        function = getattr(module, name)

        def call(*arguments, **options):
            loaded[what(*arguments)] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    counted(emorl.data, "read_table", lambda path, *_: Path(path).name)
    counted(emorl.objectives.loading, "load_objective", lambda name, config, tokenize: name)
    counted(emorl.policies.base, "load_base", lambda config, is_changed=False: "base")
    counted(AutoModelForCausalLM, "from_pretrained", lambda *_: "models")
    run_all(experiment, Silent(), as_json=True)
    assert loaded == {"prompts.csv": 1, "polite": 1, "varied": 1, "base": 1 + 2, "models": 1 + 2}
    assert json.loads(capsys.readouterr().out)["test_prompts"] == 2


def test_a_finished_stage_is_answered_from_disk_without_its_check(experiment, tmp_path):
    works = []

    @dataclass(frozen=True)
    class Result:
        value: int

    def check(experiment):
        if experiment.seed == 13:
            raise UserError("seed: expected a luckier one")

    def work(materials, run, progress):
        works.append(run.path)
        (run.path / "part.txt").write_text("part")
        if experiment.seed == 7 and len(works) == 1:
            raise KeyboardInterrupt
        return Result(len(works))

    def enough(experiment, result):
        return result.value >= experiment.search.levels

    stage = Stage("search", Result, check, ("seed", "search", "-search.levels"), work, enough)
    experiment, listener = replace(experiment, seed=7), Listener()
    with pytest.raises(KeyboardInterrupt):
        perform(stage, experiment)
    assert perform(stage, experiment) == Result(2)  # goes on
    assert perform(stage, experiment, listener) == Result(2)
    assert listener.said == [f"search: finished before, in {experiment.output / 'search'}"]
    assert perform(stage, replace(experiment, search=replace(experiment.search, levels=3))) == Result(3)  # not enough
    assert len(works) == 3
    for other in (replace(experiment, seed=8), replace(experiment, search=replace(experiment.search, samples=2))):
        with pytest.raises(UserError, match="holds a run with other settings"):
            perform(stage, other)
    fresh = replace(experiment, output=tmp_path / "fresh", seed=13)
    with pytest.raises(UserError, match="seed: expected a luckier one"):
        perform(stage, fresh)
    assert not fresh.output.exists()
    assert (experiment.output / "experiment.yaml").exists()


def test_keys_make_a_runs_identity_and_a_minus_leaves_one_out(experiment):
    keys = ("seed", "search", "-search.levels", "value.scalarize")
    picked = identity(experiment, keys)
    assert (picked["seed"], picked["value"]) == (0, {"scalarize": "mean"})
    assert "levels" not in picked["search"]
    assert picked["search"]["samples"] == 1


def test_an_unknown_stage_is_named(experiment):
    with pytest.raises(UserError, match="no stage is called 'serch'; did you mean 'search'"):
        perform("serch", experiment)


def test_a_model_a_data_set_and_functions_are_taken_as_they_are(experiment, tiny_base_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_base_dir)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = Dataset.from_dict({"prompt": [f"say {i}" for i in range(70)]})
    objects = replace(
        experiment, base=BaseConfig(model=model), data=data, objectives={"polite": politeness, "varied": "distinct_2"}
    )
    listener, materials = Listener(), Materials(objects)
    perform("train", objects, listener, materials)
    perform("search", objects, listener, materials)
    assert listener.warned == []
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert model.training is False
    kept = (objects.output / "experiment.yaml").read_text()
    assert re.search(r"model: model [0-9a-f]{64}\n", kept)
    assert f"path: data set {data._fingerprint}" in kept
    assert f"function: {__name__}:politeness" in kept
    again = Listener()
    perform("search", objects, again)
    assert again.said == [f"search: finished before, in {objects.output / 'search'}"]
    changed = replace(objects, data=data.select(range(69)))
    with pytest.raises(UserError, match=r"other settings \(data.path"):
        perform("search", changed)
    assert load_run(objects.output).search == perform("search", objects)
    by_reference = HiddenStateEnsemble.from_pretrained(objects.output / "search" / "ensemble")
    given = HiddenStateEnsemble.from_pretrained(objects.output / "search" / "ensemble", base=model)
    assert by_reference.weights == given.weights


def test_a_function_without_a_name_runs_and_says_that_it_is_not_resumed(experiment):
    objective = lambda prompts, completions, **columns: [0.5] * len(completions)  # noqa: E731
    unnamed, listener = replace(experiment, objectives={"flat": objective, "varied": "distinct_2"}), Listener()
    assert set(perform("train", unnamed, listener)) == {"flat", "varied"}
    assert isinstance(perform("search", unnamed), SearchResult)
    line = "objective 'flat' is a function without a name of its own: these runs are not resumed by another process"
    assert line in listener.warned
    other = replace(experiment, objectives={"flat": lambda **columns: [0.5], "varied": "distinct_2"})
    with pytest.raises(UserError, match="other settings"):
        perform("search", other)


def test_a_kept_experiment_of_objects_says_that_they_must_be_given_again(experiment, tiny_base_dir, tmp_path):
    objects = replace(experiment, base=BaseConfig(model=AutoModelForCausalLM.from_pretrained(tiny_base_dir)))
    perform("train", objects)
    kept = load_experiment(objects.output / "experiment.yaml", [f"output={tmp_path / 'other'}"])
    assert "<transformers" in to_yaml(objects)
    with pytest.raises(UserError, match=r"base.model .model [0-9a-f]+.: neither a folder here nor a model on the hub"):
        perform("train", kept)


def readme_blocks():
    text = (ROOT / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_the_readmes_python_runs(experiment, tiny_base_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loading, performing = readme_blocks()
    assert all(len(block.strip().splitlines()) <= 10 for block in (loading, performing))
    dataset = Dataset.from_dict({"prompt": [f"say {i}" for i in range(80)]})
    names = {"politeness": politeness, "dataset": dataset, "model": str(tiny_base_dir)}
    few = {"train": TRAIN, "search": {"levels": 1}, "generation": {"max_new_tokens": 4}}
    monkeypatch.setattr(emorl, "Experiment", lambda **blocks: Experiment(**blocks, **few), raising=False)
    exec(performing, names)
    folder = Path("runs/mine/search/ensemble")
    assert AutoTokenizer.from_pretrained(folder).chat_template is not None
    named = loading.replace('{"helpful": 0.6, "polite": 0.3, "concise": 0.1}', '{"polite": 0.6, "concise": 0.4}')
    exec(named, {})
    assert (folder / "adapters" / "polite").is_dir()
