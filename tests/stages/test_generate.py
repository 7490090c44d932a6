"""`emorl generate`: weights by name, by preference or the best ones; settings of decoding; mistakes before any library."""

import json
import shutil
import subprocess
import sys

import pytest

from emorl.cli import main
from emorl.config.experiment import BaseConfig, DataConfig, Experiment, ObjectiveConfig
from emorl.runs.layout import ENSEMBLE, Layout
from emorl.runs.results import Point, SearchResult, write_result
from emorl.stages.generate import Wish, generate_lines
from emorl.stages.materials import Materials
from emorl.stages.stage import keep_experiment

FRONT = [
    Point({"brief": 0.0, "varied": 1.0}, {"brief": 0.2, "varied": 0.9}, 0.55),
    Point({"brief": 0.6, "varied": 0.4}, {"brief": 0.7, "varied": 0.5}, 0.6),
]


@pytest.fixture(scope="module")
def layout(tmp_path_factory, tiny_base_dir, make_causal_model, write_adapter):
    """A run whose search has found the front."""
    root = tmp_path_factory.mktemp("generate")
    experiment = Experiment(
        output=root / "run",
        base=BaseConfig(model=str(tiny_base_dir)),
        data=DataConfig(path=str(root / "prompts.jsonl"), validation=2, test=2),
        objectives={"brief": ObjectiveConfig(function="length"), "varied": ObjectiveConfig(function="distinct_2")},
        generation={"max_new_tokens": 8, "do_sample": False},
    )
    layout = Layout(experiment.output)
    for seed, name in enumerate(experiment.objectives):
        write_adapter(make_causal_model("llama"), layout.policy(name), seed=seed)
    keep_experiment(experiment)
    layout.search.mkdir()
    Materials(experiment).mixture().save_pretrained(layout.search / ENSEMBLE)
    write_result(layout.search, SearchResult("hierarchical_grid", "mean", {}, 2, None, best=FRONT[1], front=FRONT))
    return layout


@pytest.fixture
def answer(layout, capsys):
    def ask(*options, of=layout.output):
        """The answer, and the first line on standard error."""
        capsys.readouterr()
        assert main(["generate", str(of), "--prompt", "say yes", "--json", *options]) == 0
        captured = capsys.readouterr()
        return json.loads(captured.out), captured.err.splitlines()[0]

    return ask


def test_all_weight_on_one_policy_answers_as_that_policy_does(layout, answer):
    for name in ("brief", "varied"):
        mixed, said = answer("--weights", f"{name}=1")
        alone, said_alone = answer(of=layout.policy(name))
        assert mixed["completion"] == alone["completion"]
        assert mixed["weights"] == {"brief": float(name == "brief"), "varied": float(name == "varied")}
        assert said == f"weights: brief {name == 'brief':d}, varied {name == 'varied':d}"
        assert said_alone == f"weights: none, one policy answers: {layout.policy(name)}"


def test_without_weights_the_best_point_answers_and_a_preference_chooses_another(answer):
    best, said = answer()
    assert best["weights"] == FRONT[1].weights
    assert best["scores"] == FRONT[1].scores
    assert said == "weights: brief 0.6, varied 0.4"
    assert answer("--weights", "brief=0.6,varied=0.4")[0]["completion"] == best["completion"]
    preferred, _ = answer("--prefer", "varied=1")
    assert preferred["weights"] == FRONT[0].weights
    assert preferred["completion"] == answer("--weights", "varied=1")[0]["completion"]


def test_a_run_answers_alike_where_its_policies_have_gone_and_it_was_moved(layout, answer, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(layout.output, moved, ignore=shutil.ignore_patterns("train"))
    for options in ([], ["--prefer", "varied=1"], ["--weights", "brief=1"]):
        assert answer(*options, of=moved) == answer(*options)


def test_settings_of_decoding_replace_the_experiments(layout, answer):
    text, short = (answer(*options)[0]["completion"] for options in ([], ["generation.max_new_tokens=2"]))
    assert text.startswith(short.rstrip("\ufffd"))  # tokens are bytes: a character cut in two
    assert text != short
    assert len(answer("generation.max_new_tokens=2", of=layout.policy("brief"))[0]["completion"]) < len(text)


def test_the_lines_are_those_of_the_library(layout, answer):
    [line] = generate_lines(layout.output, ["say yes"], Wish(weights={"varied": 2.0}), as_json=True)
    assert json.loads(line) == answer("--weights", "varied=2")[0]


MISTAKES = [
    (["--prefer", "breif=1"], "preferences name breif; did you mean 'brief'"),
    (["--weights", "varid=1"], "no policy is called 'varid'; did you mean 'varied'"),
    (["--weights", "brief=0"], "not all 0"),
    (["--weights", "brief=nan"], "expected finite numbers"),
    (["--weights", "brief=-1,varied=2"], "none below 0"),
    (["--weights", "brief=1e39"], "the largest in [1e-6, 1e6]"),
    (["--weights", "brief=1e-300"], "the largest in [1e-6, 1e6]"),
    (["--prefer", "brief=1e308,varied=1e308"], "preferences must be finite"),
    (["--weights", "brief=1", "--prefer", "brief=1"], "use one of both"),
    (["search.levels=3"], "only settings of decoding can be changed here"),
    (["generation=3"], "generation: expected settings of decoding"),
    ([], "no prompt given"),
]


def test_cheap_mistakes_are_one_line_before_any_library(layout):
    lines = [[str(layout.output), *options] for options, _ in MISTAKES] + [[str(layout.output.parent), "--prompt", "x"]]
    code = (
        "import json, sys; from emorl.cli import main\n"
        "assert {main(['generate', *words]) for words in json.loads(sys.argv[1])} == {2}\n"
        "assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(lines)], input="", capture_output=True, text=True, check=True)
    said = done.stderr.splitlines()
    for line, message in zip(said, [*(message for _, message in MISTAKES), "is not a run directory"], strict=True):
        assert message in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["generation.max_new_tokes=3"], "unknown setting 'max_new_tokes'; did you mean 'max_new_tokens'"),
        (["generation.max_new_tokens=0"], "must be greater than 0"),
        (["generation.max_new_tokens=many"], "generation.max_new_tokens: expected a whole number"),
    ],
)
def test_impossible_settings_of_decoding_are_one_line(layout, capsys, options, message):
    assert main(["generate", str(layout.output), "--prompt", "x", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_one_policy_takes_no_weights(layout, capsys):
    assert main(["generate", str(layout.policy("brief")), "--prompt", "x", "--weights", "brief=1"]) == 2
    assert "is one policy, without a front to choose from; leave --weights out" in capsys.readouterr().err
