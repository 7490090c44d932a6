import dataclasses

import pytest

from emorl.config import UserError
from emorl.config.experiment import Experiment, load_experiment, load_kept_experiment
from emorl.config.objective import TransformConfig
from emorl.config.yaml import apply_overrides, as_mapping, describe, parse, read_yaml, to_yaml

CONTENT = {
    "output": "runs/x",
    "base": {"model": "m"},
    "data": {"path": "p.jsonl"},
    "objectives": {"a": {"function": "classifier", "model": "z"}, "b": "package.module:reward"},
}


def experiment(*overrides):
    return parse(Experiment, apply_overrides(CONTENT, overrides), "x.yaml")


def test_options_beside_function_are_its_options():
    objectives = experiment().objectives
    assert objectives["a"].function == "classifier"
    assert objectives["a"].options == {"model": "z"}
    assert objectives["b"].function == "package.module:reward"


def test_transform_beside_function_is_no_option_unless_it_stands_in_options():
    objectives = experiment(
        "objectives.a.transform.log=true", "objectives.c={function: f, options: {transform: up}}"
    ).objectives
    assert objectives["a"].transform == TransformConfig(log=True)
    assert objectives["a"].options == {"model": "z"}
    assert objectives["b"].transform is None
    assert (objectives["c"].transform, objectives["c"].options) == (None, {"transform": "up"})


def test_a_written_experiment_is_read_back_equal(tmp_path):
    settings = ["train.grpo.learning_rate=1e-3", "objectives.a.transform={range: [0, 5], log: true}"]
    (tmp_path / "experiment.yaml").write_text(to_yaml(experiment(*settings)))
    again = load_kept_experiment(tmp_path)
    assert again == experiment(*settings, f"output={tmp_path}")  # where it is found
    assert again.train.grpo["learning_rate"] == 0.001


def test_overrides_leave_the_given_mapping_alone():
    apply_overrides(CONTENT, ["base.model=other", "search.levels=2"])
    assert CONTENT["base"] == {"model": "m"}
    assert "search" not in CONTENT


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    (tmp_path / "e.yaml").write_text("a: 1e-3\nb: 1.5E+2\nc: e1\n")
    assert read_yaml(tmp_path / "e.yaml") == {"a": 0.001, "b": 150.0, "c": "e1"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("serch.levels=3", "unknown key 'serch'; did you mean 'search'"),
        ("search.levles=3", "unknown key 'search.levles'; did you mean 'levels'"),
        ("search.levels=-1", "search.levels: expected a number of at least 1, got -1$"),
        ("search.levels=many", "search.levels: expected a whole number, got 'many'"),
        ("value.scalarize=median", "'mean', 'weighted', 'minimum' or 'chebyshev'"),
        ("data.path=null", "data.path: expected a text, got nothing; give it a value"),
        ("output=", "output: expected a path, got nothing; give it a value"),
        ("fuse.weights={a:1}", "fuse.weights.a:1: expected a number, got nothing; YAML needs a blank behind the colon: {a: 1}"),
        ("fuse.scales=[0]", "fuse.scales.0: expected a number above 0, got 0"),
        ("fuse.methods=[]", r"fuse.methods: expected at least 1 of them, got \[\]"),
        ("ensemble.include_base=maybe", "ensemble.include_base: expected true or false, got 'maybe'"),
        ("fuse.methods=ties", "fuse.methods: expected a list, such as"),
        ("base=3", "base: expected a block with keys of its own, such as {key: value}, got 3"),
        ("objectives={}", "name at least one objective"),
        ("objectives.a.transform.lag=true", "unknown key 'objectives.a.transform.lag'; did you mean 'log'"),
        ("objectives.a.transform.range=[5, 1]", "objectives.a.transform: range: expected two numbers, the lower"),
        ("objectives.a.transform.range=5", "objectives.a.transform.range: expected a list"),
        ("objectives.a-b=length", "'a-b' cannot name an objective"),
        ("objectives.base=length", "'base' cannot name an objective"),
        ("value.preferences={q: 1}", r"value.preferences names \['q'\], but the objectives are \['a', 'b'\]"),
        ("levels", "expected dotted.key=value"),
        ("seed.x.y=1", None),
        ("output.x=1", "'output' is 'runs/x', not a block"),
        ("base.model=[", "is not a YAML value"),
    ],
)
def test_a_wrong_setting_is_one_line_of_advice(override, message):
    with pytest.raises(UserError, match=message) as caught:
        experiment(override)
    assert "\n" not in str(caught.value)


def test_a_file_of_checkpoints_is_sent_to_its_command(tmp_path):
    for text in ("output: x\nmodels: {a: b}\n", "merge_method: linear\nmodels: [{model: b}]\n"):
        (tmp_path / "fuse.yaml").write_text(text)
        with pytest.raises(
            UserError, match=r"is a file of checkpoints to fuse, not an experiment: use `emorl fuse .*fuse.yaml`"
        ):
            load_experiment(tmp_path / "fuse.yaml")


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match=r"x.yaml: key 'base.model' is missing"):
        parse(Experiment, {**CONTENT, "base": {}}, "x.yaml")


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- a", "expected a mapping"), (None, "no such file"), ("", "expected a")]
)
def test_a_file_that_is_no_experiment_is_refused(tmp_path, text, message):
    path = tmp_path / "experiment.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_experiment(path)


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        load_kept_experiment(tmp_path)


def test_help_names_every_key_with_its_meaning():
    text = describe(Experiment)
    assert "objectives.NAME.transform.log [False]  training maximises log(score)" in text
    assert "\n\n  search  search for the weights\n  search.proposer [auto]  " in text
    assert "  fuse.methods [slerp, ties]  that the search switches between" in text
    assert "  generation [{max_new_tokens: 64, do_sample: false}]  " in text

    def check(block, prefix):
        for name in as_mapping(block):
            line = next(line for line in text.splitlines() if line.strip().startswith(f"{prefix}{name} "))
            assert len(line.split("  ")) > 2, f"{prefix}{name} has no meaning in --help"
            value = getattr(block, name)
            if dataclasses.is_dataclass(value):
                check(value, f"{prefix}{name}.")

    check(experiment(), "")


def test_a_file_may_be_based_on_another_one(tmp_path):
    (tmp_path / "below.yaml").write_text("output: a\nsearch: {levels: 3, trials: 9}\nlist: [1, 2]\n")
    (tmp_path / "above.yaml").write_text("based_on: below.yaml\nsearch: {levels: 4}\nlist: [5]\n")
    assert read_yaml(tmp_path / "above.yaml") == {"output": "a", "search": {"levels": 4, "trials": 9}, "list": [5]}


@pytest.mark.parametrize("value", ["itself.yaml", "[a]", "3"])
def test_what_a_file_cannot_be_based_on_is_refused(tmp_path, value):
    (tmp_path / "itself.yaml").write_text(f"based_on: {value}\n")
    with pytest.raises(UserError, match="based_on names another YAML file beside this one"):
        read_yaml(tmp_path / "itself.yaml")


def test_files_based_on_each_other_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("based_on: b.yaml")
    (tmp_path / "b.yaml").write_text("based_on: a.yaml")
    with pytest.raises(UserError, match=r"b.yaml: based_on names another YAML file"):
        read_yaml(tmp_path / "a.yaml")


def test_a_missing_file_below_is_named(tmp_path):
    (tmp_path / "above.yaml").write_text("based_on: nothing.yaml\n")
    with pytest.raises(UserError, match=r"nothing.yaml: no such file"):
        read_yaml(tmp_path / "above.yaml")
