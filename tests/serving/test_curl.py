"""curl against the real server: a whole answer, a streamed one as it comes, and what curl sends unless it is told."""

import json
import shutil
import subprocess

import pytest

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
JSON = ("-H", "Content-Type: application/json")
ASKED = {"model": "emorl/front/2", "max_tokens": 40, "messages": [{"role": "user", "content": "naïve 🙂"}]}


def curl(*words):
    """The status, and the body."""
    command = ["curl", "-sS", "--max-time", "60", "-w", "\n%{http_code}", *words]
    body, _, status = subprocess.run(command, capture_output=True, check=True, text=True).stdout.rpartition("\n")
    return int(status), body


def test_a_streamed_answer_is_the_whole_one(url):
    where = f"{url}/v1/chat/completions"
    status, body = curl(where, *JSON, "-d", json.dumps(ASKED))
    assert status == 200
    whole = json.loads(body)["choices"][0]
    status, body = curl("-N", where, *JSON, "-d", json.dumps(ASKED | {"stream": True}))
    assert status == 200
    *events, last, end = body.split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == whole["message"]["content"]
    assert chunks[-1]["finish_reason"] == whole["finish_reason"]


def test_a_streamed_answer_comes_while_it_is_written(url):
    fields = {"messages": [{"role": "user", "content": "say yes"}], "n": 30, "max_tokens": 2000, "stream": True}
    command = ["curl", "-sSN", "--max-time", "60", f"{url}/v1/chat/completions", *JSON, "-d", json.dumps(fields)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("data: {")
        health = json.loads(curl(f"{url}/health")[1])
        process.kill()
    assert health["running"] > 0


@pytest.mark.parametrize("kind", [None, "text/plain", "multipart/form-data", "Application/JSONP", ""])
def test_json_must_be_called_json(url, kind):
    """A page of another site can send the others without asking."""
    header = () if kind is None else ("-H", f"Content-Type: {kind}")
    status, body = curl(f"{url}/v1/chat/completions", *header, "-d", json.dumps(ASKED))
    assert status == 415
    assert json.loads(body)["error"]["message"] == "send JSON, with the header Content-Type: application/json"


def test_the_name_of_the_content_type_has_no_case_and_may_have_parameters(url):
    for kind in ("Application/JSON", "application/json; charset=utf-8", "application/json;charset=UTF-8"):
        status, _ = curl(f"{url}/v1/chat/completions", "-H", f"Content-Type: {kind}", "-d", json.dumps(ASKED))
        assert status == 200


def test_a_key_is_sent_as_a_bearers(serve):
    with serve(key="clé") as where:
        assert curl(f"{where}/v1/models", "-H", "Authorization: Bearer clé")[0] == 200
        assert curl(f"{where}/v1/models", "-H", "authorization: bearer clé")[0] == 200
        for given in (
            "Authorization: clé",
            "Authorization: Bearer cle",
            "Authorization: Bearer",
            "Authorization: Basic clé",
            "X: y",
        ):
            status, body = curl(f"{where}/v1/models", "-H", given)
            assert status == 401
            assert json.loads(body)["error"]["code"] == "invalid_api_key"


def test_no_page_of_another_site_is_let_in(url):
    status, body = curl("-X", "OPTIONS", f"{url}/v1/chat/completions", "-H", "Origin: https://evil.test", "-D", "-")
    assert status == 405
    assert "access-control" not in body.lower()
