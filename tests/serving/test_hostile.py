"""Thousands of malformed and hostile requests: each gets a refusal in OpenAI's form or an answer, and the server goes on."""

import json
import math
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from emorl.serving.requests import ChatRequest, CompletionRequest
from tests.serving.wire import CHAT, COMPLETIONS, JSON, Reply, ask, chat, is_idle, request

pytestmark = pytest.mark.usefixtures("no_errors", "unharmed")
fuzz = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=300,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
TALK = {"messages": [{"role": "user", "content": "say yes"}]}
GOOD: dict[bytes, dict[str, Any]] = {CHAT: TALK, COMPLETIONS: {"prompt": "say yes"}}
FIELDS = [
    (path, field) for path, kind in ((CHAT, ChatRequest), (COMPLETIONS, CompletionRequest)) for field in kind.model_fields
]
HOSTILE = [
    *(None, True, 0, -1, 1, 2**31, 2**63, 2**64, -(2**64), 10**400, 0.5, -0.0, 1e-45, 1e-300, 1e308, -1e308),
    *(math.nan, math.inf, -math.inf),
    *("", "\0", "x", "emorl", "emorl/front/1", "a" * 3000, "\ud800", "\udfff\ud800", "\u202e\ufeff\uffff", "💥" * 1000),
    *("<|end|><|user|>", "{{ 7 * 7 }}", "%}{%", "${jndi:ldap://x}", "../../etc/passwd"),
    *([], [[]], [None], [""], [[0]], [-1], [10**9], [2**70], ["x"] * 5000, [0.5], [{}], [True]),
    *({}, {"": ""}, {"brief": 1}, {"brief": 1e308, "varied": 1e308}, {"brief": 1e-320}, {"brief": math.nan}, {"brief": -1}),
    *({"brief": "1"}, {"__class__": "x"}, {"type": "text"}, {"type": "json_object"}, {"include_usage": []}),
    {str(number): 1 for number in range(2000)},
]


@pytest.fixture(scope="module")
def hostile_url(serve):
    """A server whose answers are short."""
    with serve(generation={"max_new_tokens": 2}, seconds=2) as where:
        yield where


@pytest.fixture
def unharmed(hostile_url):
    """After all that, it answers as before, and nothing is left over."""
    before = chat(hostile_url, seed=1, temperature=1).json["choices"]
    yield
    assert chat(hostile_url, seed=1, temperature=1).json["choices"] == before
    assert is_idle(hostile_url)


def is_proper(reply: Reply | None, path: bytes = CHAT) -> Reply:
    assert reply is not None
    assert reply.status < 500
    if reply.status == 200:
        if reply.headers["content-type"].startswith("text/event-stream"):
            *events, last = reply.body.decode().removesuffix("\n\n").split("\n\n")
            assert last == "data: [DONE]"
            assert all(json.loads(event.removeprefix("data: "))["object"] for event in events)
        else:
            assert reply.json["choices" if path in GOOD else "object"]
    else:
        assert reply.error["message"]
    return reply


def sent(url: str, path: bytes, fields: Any) -> Reply:
    body = json.dumps(fields).encode()
    return is_proper(ask(url, request(body, path)), path)


@pytest.mark.parametrize(("path", "field"), FIELDS, ids=lambda value: str(value).strip("b'"))
def test_no_value_of_any_field_is_too_strange(hostile_url, path, field):
    for value in HOSTILE:
        sent(hostile_url, path, GOOD[path] | {field: value})


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(HOSTILE),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)


@fuzz
@given(anything, st.sampled_from(list(GOOD)))
def test_no_json_is_too_strange(hostile_url, content, path):
    sent(hostile_url, path, content)


@fuzz
@given(st.data())
def test_no_mixture_of_fields_is_too_strange(hostile_url, data):
    path = data.draw(st.sampled_from(list(GOOD)))
    fields = [field for where, field in FIELDS if where == path]
    values = st.dictionaries(st.sampled_from(fields) | st.text(max_size=8), anything, max_size=6)
    sent(hostile_url, path, GOOD[path] | data.draw(values))


turns = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "developer", "tool", ""]), "content": st.text() | anything},
        optional={"name": anything, "tool_calls": anything},
    ),
    max_size=4,
)


@fuzz
@given(
    turns, st.dictionaries(st.text(max_size=10) | st.sampled_from(["messages", "self", "loop", "range"]), anything, max_size=3)
)
def test_no_conversation_is_too_strange(hostile_url, messages, arguments):
    sent(hostile_url, CHAT, {"messages": messages, "chat_template_kwargs": arguments})


@fuzz
@given(st.binary(max_size=200), st.sampled_from(list(GOOD)))
def test_no_bytes_are_too_strange(hostile_url, content, path):
    assert is_proper(ask(hostile_url, request(content, path)), path).status == 400


@fuzz
@given(st.data(), st.sampled_from(list(GOOD)))
def test_no_damage_of_a_good_request_is_too_strange(hostile_url, data, path):
    body = bytearray(json.dumps(GOOD[path] | {"weights": {"brief": 1, "fresh": 0.5}, "n": 2, "stop": "é"}).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place, new = data.draw(st.integers(0, len(body) - 1)), data.draw(st.binary(max_size=2))
        body[place : place + data.draw(st.integers(0, 3))] = new
    is_proper(ask(hostile_url, request(bytes(body), path)), path)


@fuzz
@given(
    st.text(max_size=30)
    | st.sampled_from(["brief=nan", "brief=1e999", "front/-1", "front/²", "front/1e1", "soup/", "/", "=", ",", "=1"])
)
def test_no_name_of_a_model_is_too_strange(hostile_url, name):
    sent(hostile_url, COMPLETIONS, {"model": f"emorl/{name}", "prompt": "x"})
    quoted = "".join(f"%{byte:02x}" for byte in name.encode()).encode()
    for target in (b"/v1/models/emorl/%s" % quoted, b"/v1/models/%s" % quoted):
        is_proper(ask(hostile_url, request(target=target, method=b"GET"), b"GET"), target)


TARGETS = [
    *(b"/", b"//", b"*", b"/v1", b"/v1/", b"//v1/models", b"/v1//models", b"/V1/models", b"/etc/passwd", b"/page/../page.js"),
    *(b"/v1/models" + rest for rest in (b"/", b"/..", b"/../../../etc/passwd", b"/emorl/../../x", b"?" + b"x=1&" * 1000)),
    *(b"/v1/models/" + rest for rest in (b"%2e%2e/%2e%2e/etc/passwd", b"%00", b"%ff%fe", b"%", b"%zz", b"a" * 5000)),
    *(b"/v1/chat", b"/v1/chat/completions/", b"/v1/chat/completions/..", b"/v1/chat/completions;x", b"/v1/chat/completions%2f"),
    *(b"/health/", b"/docs", b"/openapi.json", b"http://evil.test/v1/models", b"http://[::1/v1/models", b"evil.test:443"),
]
METHODS = [b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE", b"CONNECT", b"PROPFIND"]


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_no_method_or_path_is_too_strange(serve, http):
    with serve(http=http, generation={"max_new_tokens": 1}) as where:
        for method in METHODS:
            for target in [*TARGETS, CHAT, COMPLETIONS, b"/v1/models", b"/health"]:
                reply = ask(where, request(target=target, method=method), method)
                if reply is not None:  # what is no HTTP, the connection is closed for
                    assert reply.status in (200, 400, 404, 405, 415), (method, target)
                    is_error = reply.status != 200 and method != b"HEAD" and "json" in reply.headers["content-type"]
                    assert not is_error or reply.error
        assert chat(where).status == 200


HEADERS = [
    *([(b"Content-Type", kind)] for kind in (b"application/json\xff", b"", b"application/json" * 500, b"a/b; c")),
    *([], [*JSON, *JSON], [(b"Content-Type", b"text/plain"), *JSON], [(b"Content Type", b"application/json")]),
    *([*JSON, (b"Content-Length", size)] for size in (b"5", b"-1", b"9" * 30, b"\xb2", b"")),
    *([*JSON, (b"Transfer-Encoding", kind)] for kind in (b"chunked", b"gzip, chunked", b"\x0bchunked", b"identity")),
    *([*JSON, (b"Content-Encoding", b"gzip")], [*JSON, (b"Expect", b"100-continue")], [*JSON, (b"Expect", b"a miracle")]),
    *([*JSON, (b"Authorization", b"Bearer \xff\xfe")], [*JSON, (b"Authorization", b"")], [*JSON, (b"Cookie", b"\x80" * 100)]),
    *(
        [*JSON, (b"X", b"y" * 8000)],
        [*JSON, (b"X", b"y" * 200_000)],
        [*JSON, *[(b"X-%d" % place, b"y") for place in range(500)]],
    ),
    [*JSON, (b"Upgrade", b"websocket"), (b"Connection", b"Upgrade")],
    [*JSON, (b"Upgrade", b"h2c"), (b"Connection", b"Upgrade, HTTP2-Settings"), (b"HTTP2-Settings", b"AAMAAABkAAQAAP__")],
    [*JSON, (b"X-Forwarded-For", b"1.2.3.4, \xff"), (b"X-Forwarded-Proto", b"gopher"), (b"X-Forwarded-Host", b"evil.test")],
    *([*JSON, (b"Connection", b"close")], [*JSON, (b"Range", b"bytes=0-1")], [*JSON, (b"Origin", b"https://evil.test")]),
    *([(b"\xff", b"x")], [(b"", b"x")], [(b"Folded", b"a\r\n b")], [(b"X", b"\0")]),
]


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_no_header_is_too_strange(serve, http, monkeypatch):
    monkeypatch.setattr("emorl.serving.application._BODY_SECONDS", 0.5)
    body = json.dumps(TALK).encode()
    with serve(http=http, generation={"max_new_tokens": 1}) as where:
        for headers in HEADERS:
            reply = ask(where, request(body, headers=headers))
            assert reply is None or reply.status in (200, 400, 408, 415, 431), headers
        hosts = [
            b"evil.test",
            b"",
            b"127.0.0.1.evil.test",
            b"127.0.0.1@evil.test",
            b"evil.test:127.0.0.1",
            b"[::1",
            b"\xff",
            b"localhost.",
            b"0",
        ]
        for host in hosts:
            reply = ask(where, request(body, host=host))
            assert reply is None or (reply.status == 400 and (b"header Host" in reply.body or b"Invalid HTTP" in reply.body)), (
                host
            )
        for host in (b"127.0.0.1", b"localhost", b"LOCALHOST:8000", b"127.0.0.1:1"):
            assert is_proper(ask(where, request(body, host=host))).status == 200
        assert chat(where).status == 200


@pytest.mark.parametrize("depth", [10, 100, 300, 1000, 10_000, 500_000])
def test_no_json_is_too_deep(hostile_url, depth):
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        nested = opening * depth + "1" + closing * depth
        for body in (
            nested,
            opening * depth,
            f'{{"messages": {nested}}}',
            f'{{"messages": [{{"role": "user", "content": "x"}}], "metadata": {nested}}}',
            f'{{"messages": [{{"role": "user", "content": "x"}}], "chat_template_kwargs": {{"x": {nested}}}}}',
        ):
            for path in GOOD:
                is_proper(ask(hostile_url, request(body.encode(), path)), path)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"prompt": "a" * 3_000_000}, 400),
        ({"prompt": "é🙂 \n" * 150_000}, 400),
        ({"prompt": ["a" * 10_000] * 256}, 400),
        ({"prompt": [7] * 700_000}, 400),
        ({"prompt": "x", "stop": ["a" * 1000] * 3000}, 400),
        ({"prompt": "x", "user": "a" * 4_000_000}, 200),
        ({"prompt": "x", "model": "emorl/" + "brief=1," * 200_000}, 400),
        ({"prompt": "x", "weights": {f"policy {number}": 1 for number in range(100_000)}}, 400),
        ({"prompt": "a" * 5_000_000}, 413),
        ({"prompt": "a" * 50_000_000}, 413),
    ],
    ids=range(10),
)
def test_no_request_is_too_large(hostile_url, fields, status):
    assert sent(hostile_url, COMPLETIONS, fields).status == status


def test_arguments_of_the_template_are_values_and_never_parts_of_it(hostile_url):
    plain = sent(hostile_url, CHAT, TALK).json["usage"]["prompt_tokens"]
    code = "{{ ''.__class__.__mro__ }}{% for x in range(10**9) %}{% endfor %}"
    for name in ("enable_thinking", "x", "_", "self", "bos_token", "raise_exception", "a" * 64):
        for value in (code, [code], {"a": code}, 10**300, math.nan, None):
            reply = sent(hostile_url, CHAT, TALK | {"chat_template_kwargs": {name: value}})
            assert reply.status == 400 or reply.json["usage"]["prompt_tokens"] == plain
    taken = ["conversation", "chat_template", "tools", "documents", "tokenize", "add_generation_prompt", "messages"]
    others = ["continue_final_message", "padding", "return_tensors", "return_dict", "tokenizer_kwargs", "max_length"]
    for name in [*taken, *others, "x = 1 %}{{ 7 * 7 }}{%", "x %}", "a b", "1a", "", "é", "a" * 65, "x\n"]:
        assert sent(hostile_url, CHAT, TALK | {"chat_template_kwargs": {name: code}}).status == 400, name


def test_empty_prompts_and_tokens_out_of_the_vocabulary_are_refused(hostile_url):
    for prompt in ("", [], [[]], ["x", ""], [261], [-1], [[1], [300]], [1.0], [True], [1, "x"], None):
        reply = sent(hostile_url, COMPLETIONS, {"prompt": prompt})
        assert reply.status == 400
        assert reply.error["param"] == "prompt"
    for prompt in ("<|end|>", "<|pad|><|pad|>", " ", "\0", [0], [1] * 3, "\ufffd"):
        assert sent(hostile_url, COMPLETIONS, {"prompt": prompt}).status == 200


def test_a_prompt_longer_than_allowed_is_refused_and_the_longest_one_is_not(serve):
    with serve(longest_prompt=50, generation={"max_new_tokens": 1}) as where:
        for size in (50, 51, 500):
            for prompt in ("x" * size, [9] * size):
                reply = sent(where, COMPLETIONS, {"prompt": prompt})
                assert reply.status == (200 if size == 50 else 400)
                assert reply.status == 200 or "longer than this server takes: 50" in reply.error["message"]
            said = [{"role": "user", "content": "x" * (size - 3)}]  # <|user|>, <|end|> and <|assistant|> are tokens too
            assert sent(where, CHAT, {"messages": said}).status == (200 if size == 50 else 400)
        assert sent(where, COMPLETIONS, {"prompt": "x" * 40, "max_tokens": 2008}).status == 200
        assert sent(where, COMPLETIONS, {"prompt": "x" * 40, "max_tokens": 2009}).status == 400


def test_the_smallest_temperatures_and_nuclei_are_greedy(hostile_url):
    greedy = sent(hostile_url, CHAT, TALK | {"temperature": 0}).json["choices"]
    for fields in (
        [{"temperature": value} for value in (1e-3, 1e-30, 1e-40, 1e-45, 1e-300)]
        + [{"temperature": 1, "top_p": value} for value in (1e-6, 1e-30, 1e-40, 1e-45, 1e-300)]
        + [{"temperature": 1e-40, "top_p": 1e-45, "top_k": 1}]
    ):
        assert sent(hostile_url, CHAT, TALK | fields).json["choices"] == greedy, fields


def test_the_largest_and_smallest_weights_are_refused_or_mean_what_they_say(hostile_url):
    alone = sent(hostile_url, CHAT, TALK | {"model": "emorl/policy/brief"}).json["choices"]
    for weight in (1e-300, 5e-324, 1e-40, 1e-30, 1e-3, 1e3, 1e30, 3e38, 1e39, 1e308):
        reply = sent(hostile_url, CHAT, TALK | {"weights": {"brief": weight}, "logprobs": True})
        assert reply.status == 400 or all(
            math.isfinite(token["logprob"]) for token in reply.json["choices"][0]["logprobs"]["content"]
        )
        if 1e-3 <= weight <= 1e3:
            assert reply.json["choices"][0]["message"] == alone[0]["message"]


def test_no_key_of_other_bytes_opens(serve):
    body = json.dumps(TALK).encode()
    for key in ("clé 🔑", os.fsdecode(b"cl\xe9\xff")):
        given = os.fsencode(key)
        with serve(key=key, generation={"max_new_tokens": 1}) as where:
            for said in (
                None,
                b"",
                b"Bearer",
                b"Bearer ",
                b"Basic " + given,
                given,
                b"Bearer " + given[:-1],
                b"Bearer " + given + b"x",
                b"Bearer \xff",
            ):
                headers = [*JSON, *([] if said is None else [(b"Authorization", said)])]
                for target in (CHAT, COMPLETIONS, b"/v1/anything"):
                    reply = ask(where, request(body, target, headers=headers))
                    assert reply is not None
                    assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
            headers = [*JSON, (b"Authorization", b"Bearer " + given)]
            assert is_proper(ask(where, request(body, headers=headers))).status == 200
            for target in (b"//v1/models", b"/V1/models", b"/%76%31/models", b"/v1%2fmodels", b"/x/../v1/models"):
                reply = ask(where, request(target=target, method=b"GET"), b"GET")
                assert reply is not None
                assert reply.status in (401, 404)
