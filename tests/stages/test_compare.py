"""`emorl compare` through the real command line: a tiny encoder-decoder, every method, two seeds."""

import json
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import yaml
from pydantic import TypeAdapter

from emorl import data
from emorl.cli import main
from emorl.config.experiment import load_experiment
from emorl.evaluation.pareto import hypervolume
from emorl.objectives import loading
from emorl.policies import base
from emorl.reporting.method_tables import method_tables
from emorl.runs.layout import Layout
from emorl.runs.results import MethodsResult, read_result
from emorl.stages.methods import method_runs
from emorl.stages.stage import perform

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL and PEFT use names that transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
METHODS = ["ensemble", "soups", "uniform", "weighted", "gdpo", "dynaopt"]
STEPS = 3


def vowels(prompts, completions, **columns):
    return [sum(text.count(v) for v in "aeiou") / max(1, len(text)) for text in completions]


def digits(prompts, completions, **columns):
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in completions]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, tiny_seq2seq_dir):
    directory = tmp_path_factory.mktemp("compare")
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(24)))
    content = {
        "output": str(directory / "run"),
        "base": {"model": str(tiny_seq2seq_dir)},
        "data": {"path": str(prompts), "validation": 4, "test": 6},
        "objectives": {"vowels": f"{__name__}:vowels", "digits": f"{__name__}:digits"},
        "generation": {"max_new_tokens": 6, "do_sample": False},
        "train": {
            "lora": {"r": 4, "target_modules": ["q", "v", "wo"]},
            "scst": {"max_steps": STEPS, "eval_steps": 3, "per_device_train_batch_size": 4, "num_generations": 3, "beta": 0.01},
            "collapse": {"share": 0.0},
        },
        "search": {"levels": 1},
        "compare": {"methods": METHODS, "seeds": [3, 4], "preferences": [{"vowels": 1, "digits": 2}, {"digits": 1}],
                    "bootstrap": 100},
    }  # fmt: skip
    path = directory / "experiment.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def loaded():
    """How often what was loaded, by all child runs together."""
    return Counter()


@pytest.fixture(scope="module")
def finished(experiment, loaded):
    def counted(what, load):
        def load_counted(*arguments, **options):
            loaded[what if not options.get("is_changed") else f"{what} to change"] += 1
            return load(*arguments, **options)

        return load_counted

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((data, "load_prompts"), (loading, "load_objective"), (base, "load_base")):
            patch.setattr(module, name, counted(name, getattr(module, name)))
        assert main(["compare", str(experiment)]) == 0
    return experiment.parent / "run"


@pytest.fixture(scope="module")
def result(finished):
    return json.loads((finished / "compare" / "result.json").read_text())


def test_all_child_runs_share_prompts_objectives_and_the_base(finished, loaded):
    assert {name: count for name, count in loaded.items() if "change" not in name} == {
        "load_prompts": 1,
        "load_objective": 2,  # there are two of them
        "load_base": 1,
    }


def test_the_shared_base_answers_alike_whatever_was_mixed_on_it_before(finished):
    first, second = (
        pd.read_parquet(next((finished / f"seed-{seed}" / "ensemble" / "test").glob("base-*.parquet"))) for seed in (3, 4)
    )
    pd.testing.assert_frame_equal(first, second)


def test_every_method_has_the_same_budget_of_training_prompts(result):
    prompts = {method: row["prompts"]["mean"] for method, row in result["methods"].items()}
    budget = 2 * STEPS * 4
    assert prompts == {"base": None, "policies alone": budget, **dict.fromkeys(METHODS, budget)}


def test_all_are_scored_on_the_same_prompts_that_no_seed_trained_on(finished, experiment):
    prompts = {tuple(pd.read_parquet(table)["prompt"]) for table in finished.glob("seed-*/*/test/*.parquet")}
    assert len(prompts) == 1
    assert len(prompts.pop()) == 6
    assert {one.data.seed for run in method_runs(load_experiment(experiment)) for one in run.experiments} == {0}
    assert {one.seed for run in method_runs(load_experiment(experiment)) for one in run.experiments} == {3, 4}


def test_what_the_tables_say_follows_from_the_completions(finished, result):
    seeds = pd.read_csv(finished / "compare" / "seeds.csv")
    scores = [
        pd.read_parquet(next((finished / f"seed-{seed}" / "uniform" / "test").glob("uniform-*.parquet")))[
            ["vowels", "digits"]
        ].mean()
        for seed in (3, 4)
    ]
    uniform = result["methods"]["uniform"]
    assert uniform["vowels"]["mean"] == pytest.approx(np.mean([one["vowels"] for one in scores]))
    assert uniform["mean"]["deviation"] == pytest.approx(np.std([one.mean() for one in scores], ddof=1))
    reference = list(result["reference_point"].values())
    volumes = [hypervolume([one.to_numpy()], reference) for one in scores]
    assert uniform["hypervolume"]["mean"] == pytest.approx(np.mean(volumes))
    assert set(seeds["method"]) == {"base", "policies alone", *METHODS}
    assert seeds.loc[seeds["method"] == "weighted", "points"].tolist() == [2, 2]
    gap = result["differences"]["uniform"]["mean"]
    ensemble = result["methods"]["ensemble"]["mean"]["mean"]
    assert gap["difference"] == pytest.approx(ensemble - uniform["mean"]["mean"])
    assert gap["low"] <= gap["difference"] <= gap["high"]
    assert result["best_rival"]["mean"] in (*METHODS, None)  # none among ties


def test_soups_use_the_ensembles_policies_and_their_own_search(finished):
    assert not (finished / "seed-3" / "soups" / "train").exists()
    found = {
        method: json.loads((finished / "seed-3" / method / "search" / "run.json").read_text())["config"]["ensemble"]
        for method in ("soups", "ensemble")
    }
    assert found["soups"]["aggregate"] == "parameters"
    assert found["ensemble"]["aggregate"] == "hidden_states"


def test_weights_of_dynaopt_move_and_those_of_the_others_do_not(finished):
    logs = {
        method: json.loads((finished / "seed-3" / method / "train" / mode / "result.json").read_text())["log"]
        for method, mode in (("dynaopt", "dynaopt"), ("uniform", "uniform"))
    }
    assert all("weight_vowels" in entry for entry in logs["dynaopt"] if "eval_reward" in entry)
    assert not any("weight_vowels" in entry for entry in logs["uniform"])


def test_a_second_call_does_nothing_again_and_prints_json(experiment, finished, result, capsys):
    tables = {path: path.stat().st_mtime_ns for path in finished.glob("seed-*/*/test/*.parquet")}
    assert main(["compare", str(experiment), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result
    compared = load_experiment(experiment)
    assert perform("compare", compared) == read_result(MethodsResult, Layout(compared.output).comparison)
    assert tables == {path: path.stat().st_mtime_ns for path in finished.glob("seed-*/*/test/*.parquet")}


def test_one_seed_of_fewer_methods_is_a_comparison_too(experiment, finished, capsys):
    assert main(["compare", str(experiment), "compare.seeds=[4]", "compare.methods=[uniform, gdpo]", "compare.preferences=[]",
                 "--json"]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert list(found["methods"]) == ["uniform", "gdpo"]
    assert found["first"] == "uniform"
    assert found["methods"]["gdpo"]["mean"]["deviation"] is None
    assert found["methods"]["gdpo"]["decode_cost"]["mean"] > 0


def test_whole_models_are_compared_where_all_parameters_are_tuned(experiment, tmp_path, capsys):
    methods = ["compare.seeds=[4]", "compare.methods=[uniform]", "compare.preferences=[]", "compare.tuning=full"]
    assert main(["compare", str(experiment), f"output={tmp_path}", *methods, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["methods"]) == ["uniform"]
    assert (Layout(tmp_path / "seed-4" / "uniform").policy("uniform") / "config.json").is_file()


def test_the_ensemble_comes_first_and_none_stops_by_convergence(experiment):
    order = ["compare.methods=[gdpo, soups, ensemble]", "compare.preferences=[]", "compare.seeds=[0]"]
    runs = method_runs(load_experiment(experiment, order))
    assert [run.method for run in runs] == ["ensemble", "gdpo", "soups"]
    assert {one.train.convergence.threshold for run in runs for one in run.experiments} == {0.0}


def test_the_tables_name_every_method_and_what_it_cost(result):
    text = method_tables(TypeAdapter(MethodsResult).validate_python(result))
    assert text.count("**ensemble**") == 2
    assert "| weighted |" in text
    assert "share of resamples above 0" in text
    assert "nan" not in text
    assert math.isfinite(result["methods"]["ensemble"]["decode_cost"]["mean"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["compare.methods=[soups]", "compare.preferences=[]"], "method soups combines the ensemble's policies"),
        (["compare.preferences=[]"], "method weighted and preferences go together"),
        (["compare.preferences=[{vowel: 1}]"], "compare.preferences names ['vowel']"),
        (["train.mode=uniform"], "compare trains all methods itself"),
        (["compare.seeds=[1, 1]"], "each of them once"),
        (["train.scst.max_step=3"], "unknown key 'train.scst.max_step'"),
        (["train.scst.num_generations=1"], "a sample needs another one"),
        (["train.scst.reward_weights=[1]"], "use train.mode and train.preferences"),
        (["train.scst.max_steps=many"], "train.scst.max_steps: expected a whole number of at least 1, got 'many'"),
        (["train.grpo.max_steps=3"], "train.grpo has settings, but base.model"),
        (["search.storage=sqlite:///x.db"], "leave out `search.storage`"),
        (["objectives.points=length"], "'points' is a column of compare's tables"),
        (["compare.tuning=full", "base.dtype=bfloat16"], "full needs base.dtype: float32"),
    ],
)
def test_mistakes_are_one_line(experiment, tmp_path, capsys, overrides, message):
    assert main(["compare", str(experiment), f"output={tmp_path}", *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())  # nothing was trained before it was noticed


OFFLINE = ["ensemble", "ensemble_dpo", "soups_dpo", "uniform_dpo", "weighted_dpo"]


@pytest.fixture(scope="module")
def offline(tmp_path_factory, tiny_base_dir):
    """Policies trained online and offline, side by side, on a decoder."""
    directory = tmp_path_factory.mktemp("offline")
    (directory / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(24)))
    content = {
        "output": str(directory / "run"),
        "base": {"model": str(tiny_base_dir)},
        "data": {"path": str(directory / "prompts.jsonl"), "validation": 4, "test": 6},
        "objectives": {"vowels": f"{__name__}:said_vowels", "digits": f"{__name__}:said_digits"},
        "generation": {"max_new_tokens": 6, "do_sample": False},
        "train": {
            "lora": {"r": 4, "target_modules": "all-linear"},
            "grpo": {"max_steps": 2, "eval_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4},
            "dpo": {"max_steps": 2, "eval_steps": 2},
            "samples": {"per_prompt": 8, "choose": "all"},
            "collapse": {"share": 0.0},
        },
        "search": {"levels": 1},
        "compare": {"methods": OFFLINE, "seeds": [3], "preferences": [{"vowels": 1, "digits": 2}, {"digits": 1}],
                    "bootstrap": 100},
    }  # fmt: skip
    (directory / "experiment.yaml").write_text(yaml.safe_dump(content))
    assert main(["compare", str(directory / "experiment.yaml")]) == 0
    return directory / "run"


def said_vowels(prompts, completions, **columns):
    return vowels(prompts, [completion[0]["content"] for completion in completions])


def said_digits(prompts, completions, **columns):
    return digits(prompts, [completion[0]["content"] for completion in completions])


def test_methods_trained_offline_share_one_set_of_samples_and_each_is_told_all_of_it_once(offline):
    [samples] = offline.glob("**/samples.parquet")
    assert samples.parents[1].name == "ensemble_dpo"
    methods = json.loads((offline / "compare" / "result.json").read_text())["methods"]
    told = {name: row["prompts"]["mean"] for name, row in methods.items()}
    assert told == {"base": None, "policies alone": 8, "ensemble": 8, **dict.fromkeys(OFFLINE[1:], 14)}
    validated = {"uniform_dpo": 3 * 4, "weighted_dpo": 2 * 2 * 4}  # twice the steps; two policies
    for method, answers in validated.items():
        assert methods[method]["completions"]["mean"] == 14 * 8 + answers
        assert methods[method]["converged_prompts"]["mean"] is None
