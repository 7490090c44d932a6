"""The page's files and facts: what they hold, and that nothing in them runs or is read as markup."""

import json
import shlex
import shutil
from dataclasses import asdict
from functools import partial
from html.parser import HTMLParser
from importlib.resources import files

import pandas as pd
import pytest

from emorl.config.objective import ObjectiveConfig
from emorl.runs.layout import Layout
from emorl.runs.results import SearchResult, read_result
from emorl.serving.headers import SECURITY_HEADERS
from emorl.stages.page_facts import histograms, page_facts, why_not_scored
from tests.reporting.synthetic_run import HOSTILE

PAGE = files("emorl.serving") / "page"


async def asks_elsewhere(prompts, completions, **columns):
    return [0.5 for _ in completions]


class Asks:
    async def __call__(self, prompts, completions, **columns):
        return [0.5 for _ in completions]


asks = Asks()
asks_by_part = partial(asks_elsewhere, bonus=1)


def of_topic(prompts, completions, topic, **columns):
    return [0.5 for _ in completions]


def with_option(prompts, completions, bonus, extra=0.0, **columns):
    return [bonus for _ in completions]


class Counts:
    def __init__(self, least: int = 1) -> None:
        self.least = least

    def __call__(self, prompts, completions, **columns):
        return [float(len(text) >= self.least) for text in completions]


def test_the_front_comes_in_order_of_falling_value_with_the_best_point_named(client, run_of_three):
    facts = client.get("/v1/emorl/run").json()
    search = read_result(SearchResult, Layout(run_of_three).search)
    assert len(facts["front"]) == len(search.front) > 3
    assert [point["value"] for point in facts["front"]] == sorted((point.value for point in search.front), reverse=True)
    assert facts["front"][facts["best"]] == asdict(search.best)
    assert facts["policies"] == facts["objectives"] == facts["scored"] == ["reflection", "empathy", "fluency"]
    assert facts["output"] == str(run_of_three)
    assert facts["chat"] is True


def test_every_answer_to_a_test_prompt_is_counted_once(client, run_of_three):
    facts = client.get("/v1/emorl/run").json()
    answers = pd.read_parquet(Layout(run_of_three).evaluation / "completions.parquet")
    assert {sum(spread["counts"]) for spread in facts["scores"].values()} == {len(answers)}
    assert facts["prompts"] == answers.sort_values("prompt_index")["prompt"].unique()[:8].tolist()


def test_bins_hold_what_lies_in_them_and_scores_without_a_number_are_in_none():
    answered = pd.DataFrame({"kind": [0.0, 0.01, 0.51, 1.0, None], "long": [-1.0, 0.0, 0.5, 2.0, 2.0]})
    found = histograms(answered, ["kind", "long"])
    assert (found["kind"].low, found["kind"].high) == (0.0, 1.0)
    assert {place: count for place, count in enumerate(found["kind"].counts) if count} == {0: 2, 25: 1, 49: 1}
    assert (found["long"].low, found["long"].high) == (-1.0, 2.0)
    assert sum(found["long"].counts) == 5


def test_without_an_evaluation_prompts_come_from_the_data_and_no_scores_are_shown(run_of_three, preparing, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_of_three, run, ignore=shutil.ignore_patterns("evaluate"))
    assert page_facts(run, preparing).prompts == []  # the data is gone
    (tmp_path / "prompts.csv").write_text("prompt\n" + "\n".join(f"question {number}" for number in range(200)))
    kept = run / "experiment.yaml"
    kept.write_text(kept.read_text().replace("prompts.csv", str(tmp_path / "prompts.csv")))
    facts = page_facts(run, preparing)
    assert facts.scores == {}
    assert len(set(facts.prompts)) == 8
    assert all(prompt.startswith("question ") for prompt in facts.prompts)


def card_of(points, best):
    return json.dumps({"front": [asdict(point) for point in points], "weights": dict(best.weights)})


def test_an_adapter_that_was_distilled_for_a_front_brings_the_front(run_of_three, preparing, tmp_path):
    search = read_result(SearchResult, Layout(run_of_three).search)
    policy = Layout(tmp_path).distillation / "policy"
    policy.mkdir(parents=True)
    (policy / "policy.json").write_text(card_of(search.front, search.best))
    for directory in (policy, tmp_path):
        facts = page_facts(directory, preparing)
        assert facts.front[facts.best] == search.best
        assert facts.policies == ["reflection", "empathy", "fluency"]
        assert facts.objectives == list(search.best.scores)
        assert facts.scored == []
    (policy / "policy.json").write_text("{}")
    facts = page_facts(policy, preparing)
    assert (facts.front, facts.best, facts.policies) == ([], None, [])


def test_each_kind_of_model_has_the_command_that_means_it(run_of_three, preparing, tmp_path):
    run = tmp_path / "it's a run; rm -rf $HOME"
    shutil.copytree(run_of_three, run)

    def words(kind):
        return [*shlex.split(commands[kind][0])[2:], *commands[kind][1].split()]

    commands = page_facts(run, preparing).commands
    assert words("best") == words("front") == words("weights") == words("policy") == [str(run), "--weights"]
    assert words("distilled") == [f"{run}/distill/policy"]
    assert words("fused") == [f"{run}/fuse/policy"]
    assert "base" not in commands  # `emorl generate` has no word for it
    assert "soup" not in commands
    search = read_result(SearchResult, Layout(run).search)
    (run / "distill" / "policy").mkdir(parents=True)
    (run / "distill" / "policy" / "policy.json").write_text(card_of(search.front, search.best))
    commands = page_facts(run, preparing).commands
    assert words("front") == [str(run), "--ensemble", "--weights"]
    assert words("distilled") == [f"{run}/distill/policy", "--weights"]


def test_all_answers_carry_the_headers(client):
    for path in ("/", "/page.css", "/page.js", "/answers.js", "/v1/emorl/run", "/nowhere", "/page/../page.py"):
        answer = client.get(path)
        assert {name: answer.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS, path


def test_only_the_files_of_the_page_are_served_with_their_types(client):
    types = {"css": "text/css", "js": "text/javascript", "html": "text/html"}
    for file in PAGE.iterdir():
        answer = client.get("/" if file.name == "index.html" else f"/{file.name}")
        assert answer.text == file.read_text(encoding="utf-8")
        assert answer.headers["content-type"].split(";")[0] == types[file.name.rpartition(".")[2]]
    for path in ("/index.html", "/scores.py", "/..%2fpage.py", "/page.js/", "/%2e%2e/page.py"):
        assert client.get(path, follow_redirects=False).status_code in (404, 307), path


def test_the_markup_holds_no_code_and_asks_nothing_of_other_hosts():
    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            given = dict(attributes)
            assert tag not in ("style", "iframe", "object", "embed", "base")
            assert not any(name.startswith("on") or name == "style" for name in given)
            assert "src" in given or tag != "script"
            for name in ("src", "href", "action"):
                assert ":" not in given.get(name, "").removeprefix("data:"), given

    Reader().feed((PAGE / "index.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", ["page.js", "answers.js", "picture.js", "requests.js"])
def test_scripts_never_turn_text_into_markup(file):
    script = (PAGE / file).read_text(encoding="utf-8")
    for way in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(", "DOMParser", "srcdoc"):
        assert way not in script


def test_hostile_text_stays_data(client, run_of_three, preparing):
    facts = page_facts(run_of_three, preparing)
    assert HOSTILE not in client.get("/").text
    answer = client.get("/v1/emorl/run")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["prompts"] == list(facts.prompts)


@pytest.mark.parametrize(
    ("function", "options", "reason"),
    [
        ("length", {"minimum": 1, "maximum": 9}, None),
        ("repetition", {}, None),
        (f"{__name__}:with_option", {"bonus": 0.5}, None),
        (f"{__name__}:Counts", {"least": 2}, None),
        ("exact_match", {"answer_column": "reply"}, "column 'reply'"),
        ("multiple_choice", {}, "column 'answer'"),
        ("numeric_answer", {"answer_column": "answer"}, "column 'answer'"),
        (f"{__name__}:of_topic", {}, "column 'topic'"),
        *(
            (f"{__name__}:{name}", {}, "waits for another machine")
            for name in ("asks_elsewhere", "Asks", "asks", "asks_by_part")
        ),
        ("trl.rewards:think_format_reward", {}, None),
        ("trl.rewards:accuracy_reward", {}, "column 'solution'"),
        ("<lambda>", {}, "no objective function is called"),
        ("unit_tests", {"tests_column": "tests"}, "runs the answer's code"),
        ("judge", {"model": "gpt", "rubric": "kind", "endpoint": "http://localhost:1/v1"}, "may cost money"),
        ("emorl.objectives.judge.judge:Judge", {"model": "gpt", "rubric": "kind"}, "may cost money"),
        ("nobody/has-this-model", {}, "not on this disk"),
        ("no.such.module:f", {}, "cannot import"),
    ],
)
def test_an_objective_scores_any_prompt_where_that_is_cheap(function, options, reason):
    found = why_not_scored("kind", ObjectiveConfig(function=function, options=options))
    assert found is None if reason is None else reason in found


def test_a_model_scores_where_it_is_small(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    for megabytes, reason in ((199, None), (201, "its model of 201 MB is too large")):
        with weights.open("wb") as file:
            file.truncate(megabytes * 1_000_000)  # sparse
        assert why_not_scored("kind", ObjectiveConfig(function="classifier", options={"model": str(tmp_path)})) == reason
