"""What runs and folders of each kind offer, and that it answers as `emorl generate` does."""

import shutil
import socket
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from emorl.cli import main
from emorl.config import UserError
from emorl.config.experiment import EnsembleConfig, load_kept_experiment
from emorl.policies.base import load_base
from emorl.policies.preference_line import PreferenceLine
from emorl.runs.layout import ENSEMBLE, POLICY, POLICY_CARD, Layout
from emorl.runs.results import FusionResult, SearchResult, read_result, write_result
from emorl.runs.run import write_json
from emorl.stages.generate import Wish, generate_lines
from emorl.stages.materials import Materials
from emorl.stages.serve import Serving, make_server
from emorl.stages.stage import keep_experiment

PROMPT = "say yes"


@pytest.fixture
def asked():
    """Factory: the answer of a run's server to one chat."""

    def ask(directory, model="emorl", **fields):
        with TestClient(make_server(directory, Serving(host="testserver"))) as client:
            turns = [{"role": "user", "content": PROMPT}]
            answer = client.post("/v1/chat/completions", json={"model": model, "messages": turns, **fields})
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["message"]["content"], answer.json()["emorl"]

    return ask


def names_of(directory):
    with TestClient(make_server(directory, Serving(host="testserver"))) as client:
        return [model["id"] for model in client.get("/v1/models").json()["data"]]


def generated(directory, **wish):
    [line] = generate_lines(directory, [PROMPT], Wish(**wish), as_json=False)
    return line


@pytest.fixture
def run(searched, tmp_path):
    """A copy of the searched run, to be added to."""
    shutil.copytree(searched.output, tmp_path / "run")
    return Layout(tmp_path / "run")


def with_policy(run, searched, folder, name="brief"):
    shutil.copytree(searched.policy(name), folder)
    return folder


def test_a_search_offers_its_front_soups_policies_and_the_base(searched, asked):
    front = [f"front/{number}" for number in (1, 2, 3)]
    steered = ["best", *front, *(f"soup/{name}" for name in ("best", *front))]
    alone = ["policy/brief", "policy/varied", "policy/fresh", "base"]
    assert names_of(searched.output) == [f"emorl/{name}" for name in (*steered, *alone)]
    values = [asked(searched.output, f"emorl/front/{number}")[1]["value"] for number in (1, 2, 3)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("wish", [{}, {"prefer": {"varied": 1.0}}, {"weights": {"brief": 0.2, "fresh": 0.8}}])
def test_a_chat_is_answered_as_generate_answers(searched, asked, wish):
    assert asked(searched.output, **wish)[0] == generated(searched.output, **wish)


def test_one_policy_answers_as_its_folder_does(searched, asked):
    for name in ("brief", "varied"):
        of_run, of_folder = asked(searched.output, f"emorl/policy/{name}")[0], asked(searched.policy(name))[0]
        assert of_run == of_folder == generated(searched.policy(name))
    assert names_of(searched.policy("brief")) == ["emorl/policy"]


def test_a_run_that_averages_parameters_serves_them_alone(run, asked):
    experiment = load_kept_experiment(run.output)
    averaged = replace(experiment, ensemble=EnsembleConfig(aggregate="parameters"))
    keep_experiment(averaged)
    shutil.rmtree(run.search / ENSEMBLE)
    Materials(averaged).mixture().save_pretrained(run.search / ENSEMBLE)
    assert not any("soup" in name for name in names_of(run.output))
    assert asked(run.output)[0] == generated(run.output)


def test_a_fused_and_a_distilled_adapter_have_names(run, searched, asked):
    fused = with_policy(run, searched, run.fusion / POLICY)
    write_result(run.fusion, FusionResult("linear"))
    distilled = with_policy(run, searched, run.distillation / POLICY, "varied")
    write_json(distilled / POLICY_CARD, {"weights": {"brief": 0.0, "varied": 1.0, "fresh": 0.0}})
    assert {"emorl/fused", "emorl/distilled"} < set(names_of(run.output))
    assert asked(run.output, "emorl/fused")[0] == generated(fused)
    text, described = asked(run.output, "emorl/distilled")
    assert text == generated(distilled)
    assert described["weights"] == {"brief": 0.0, "varied": 1.0, "fresh": 0.0}


def test_an_adapter_for_the_whole_front_is_told_the_requests_trade_off(run, searched, asked):
    folder = with_policy(run, searched, run.distillation / POLICY)
    search = read_result(SearchResult, run.search)
    line = PreferenceLine("Priorities: {weights}.", ("brief", "varied", "fresh"))
    front = [vars(point) for point in search.front]
    write_json(folder / POLICY_CARD, {**line.card(), "front": front, "weights": dict(search.best.weights)})
    write_json(run.distillation / "result.json", {})
    for fields, wish in (({}, {}), ({"prefer": {"varied": 1.0}},) * 2, ({"weights": {"brief": 1.0, "fresh": 3.0}},) * 2):
        assert asked(run.output, "emorl/distilled", **fields)[0] == generated(run.output, **wish)
    by_name = asked(run.output, "emorl/distilled/brief=1,fresh=3")[0]
    assert by_name == asked(run.output, "emorl/distilled", weights={"brief": 1.0, "fresh": 3.0})[0]
    assert asked(folder, weights={"brief": 1.0, "fresh": 3.0})[0] == by_name  # the folder alone


def test_a_whole_model_is_served_as_it_is(run, tmp_path, asked):
    base = load_base(load_kept_experiment(run.output).base)
    base.model.save_pretrained(tmp_path / "whole")
    base.tokenizer.save_pretrained(tmp_path / "whole")
    own = asked(tmp_path / "whole", max_tokens=12, temperature=0)[0]
    assert own == asked(run.output, "emorl/base")[0]
    assert names_of(tmp_path / "whole") == ["emorl/policy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["serve.row=8"], "serve: unknown key 'row'; did you mean 'rows'"),
        (["search.levels=3"], "search: only serve.… and generation.… can be changed here"),
        (["generation.num_beams=3"], "generation"),
        (["--api-key", "NOT_THERE"], "the environment variable NOT_THERE is not set"),
        (["--port", "99999"], "--port 99999: expected 0 to 65535"),
        (["--host", "256.1.1.1"], "choose another --host or --port"),
    ],
)
def test_mistakes_are_one_line(searched, capsys, options, message):
    assert main(["serve", str(searched.output), "--port", "0", *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_a_port_that_is_in_use_is_one_line(searched, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(searched.output), "--port", str(port)]) == 2
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err


def test_a_folder_without_anything_to_serve_is_refused(tmp_path, run):
    with pytest.raises(UserError, match="is not a run directory"):
        make_server(tmp_path, Serving())
    shutil.rmtree(run.search)
    with pytest.raises(UserError, match="search"):
        make_server(run.output, Serving())
