"""`POST /v1/emorl/scores`: the run's own scores of any answers, and a sentence for whatever is no request."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from starlette.routing import Route

from emorl.config.objective import ObjectiveConfig
from emorl.objectives.loading import Objective, load_objective
from emorl.serving.scores import AnswerScores

JSON = {"Content-Type": "application/json"}


def ask(client, **body):
    return client.post("/v1/emorl/scores", json=body)


@pytest.fixture
def serve(client_of):
    """Factory: a client of scores by these functions, of a run whose prompts are conversations."""

    def make(**functions):
        scores = AnswerScores({name: partial(Objective, name, function) for name, function in functions.items()}, chat=True)
        return client_of([Route("/v1/emorl/scores", scores.answer, methods=["POST"])])

    return make


def test_scores_are_those_of_the_objective_itself_for_texts_and_turns(client):
    texts = ["One two three.", "", "word " * 20]
    length = load_objective("length", ObjectiveConfig(function="length", options={"minimum": 1, "maximum": 9}))
    expected = [dict.fromkeys(("reflection", "empathy", "fluency"), score) for score in length(["hi"] * 3, texts)]
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    for prompt in ("hi", turns):
        answer = ask(client, prompt=prompt, completions=texts)
        assert answer.json() == {"scores": expected, "problems": {}}
    assert expected[0]["empathy"] == 1.0 > expected[2]["empathy"]


def test_an_objective_gets_conversations_where_the_run_has_them(serve):
    seen = []
    client = serve(seen=lambda prompts, completions: seen.append((prompts, completions)) or [0.5])
    ask(client, prompt="hi", completions=["yes"])
    assert seen == [([[{"role": "user", "content": "hi"}]], [[{"role": "assistant", "content": "yes"}]])]


HOSTILE = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[]",
    "null": b"null",
    "a number": b"1e999",
    "another encoding": '{"prompt": "hé", "completions": ["a"]}'.encode("latin-1"),
    "deep nesting": b'{"prompt": ' + b"[" * 90_000 + b"]" * 90_000 + b', "completions": ["a"]}',
    "a deep object": b'{"a":' * 30_000 + b"1" + b"}" * 30_000,
    "a lone surrogate": b'{"prompt": "\\ud800", "completions": ["a"]}',
    "a lone surrogate in an answer": b'{"prompt": "a", "completions": ["\\udfff"]}',
    "no prompt": b'{"completions": ["a"]}',
    "no completions": b'{"prompt": "a"}',
    "an empty list": b'{"prompt": "a", "completions": []}',
    "a text as list": b'{"prompt": "a", "completions": "a"}',
    "numbers as answers": b'{"prompt": "a", "completions": [1, 2]}',
    "null as answer": b'{"prompt": "a", "completions": [null]}',
    "lists as answers": b'{"prompt": "a", "completions": [["a"]]}',
    "a number as prompt": b'{"prompt": 5, "completions": ["a"]}',
    "a flag as prompt": b'{"prompt": true, "completions": ["a"]}',
    "no turns": b'{"prompt": [], "completions": ["a"]}',
    "turns without a role": b'{"prompt": [{"content": "a"}], "completions": ["a"]}',
    "an unknown role": b'{"prompt": [{"role": "root", "content": "a"}], "completions": ["a"]}',
    "content that is no text": b'{"prompt": [{"role": "user", "content": {"a": 1}}], "completions": ["a"]}',
    "10,000 completions": json.dumps({"prompt": "a", "completions": ["a"] * 10_000}).encode(),
    "17 completions": json.dumps({"prompt": "a", "completions": ["a"] * 17}).encode(),
    "an unknown field": b'{"prompt": "a", "completions": ["a"], "file": "/etc/passwd"}',
    "a number of 5,000 digits": b'{"prompt": ' + b"9" * 5000 + b', "completions": ["a"]}',
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_no_request_is_refused_in_a_sentence(client, body):
    answer = client.post("/v1/emorl/scores", content=body, headers=JSON)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert 5 < len(error["message"]) < 300
    assert "Traceback" not in error["message"]


def test_megabytes_are_refused(client):
    pieces = (b" " * 10_000 for _ in range(100))
    for content in (b" " * 5_000_000, pieces):  # with and without a length
        answer = client.post("/v1/emorl/scores", content=content, headers=JSON)
        assert answer.status_code == 413
        assert "larger than" in answer.json()["error"]["message"]


def test_another_sites_page_cannot_have_answers_scored_unasked(client):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = client.post(
            "/v1/emorl/scores", content=b'{"prompt": "a", "completions": ["b"]}', headers={"Content-Type": kind}
        )
        assert answer.status_code == 415
    assert client.get("/v1/emorl/scores").status_code == 405
    assert "access-control-allow-origin" not in client.get("/v1/emorl/run").headers


def test_an_objective_that_fails_leaves_the_others_their_scores(serve):
    def broken(prompts, completions):
        raise RuntimeError("no such thing")

    answer = ask(serve(broken=broken, fine=lambda prompts, completions: [1.0, None]), prompt="a", completions=["b", "c"])
    assert answer.json()["scores"] == [{"broken": None, "fine": 1.0}, {"broken": None, "fine": None}]
    [problem] = answer.json()["problems"].values()
    assert problem == "it failed on this answer; the server's log says more"


def test_answers_are_scored_one_request_after_the_other_and_few_may_wait(serve):
    at_work, most, lock = [], [], threading.Lock()

    def slow(prompts, completions):
        with lock:
            at_work.append(1)
            most.append(len(at_work))
        time.sleep(0.1)
        with lock:
            at_work.pop()
        return [0.5]

    with serve(slow=slow) as client, ThreadPoolExecutor(20) as threads:  # one event loop for all
        codes = list(threads.map(lambda _: ask(client, prompt="a", completions=["b"]).status_code, range(20)))
    assert max(most) == 1
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 9
