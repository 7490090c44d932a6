"""Clients that are slow, many, rude or gone, on sockets of their own; and a server that is told to end while it writes."""

import contextlib
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from emorl.stages.serve import Serving, _bound
from tests.serving.wire import Connection, chat, health, is_idle, request

pytestmark = pytest.mark.usefixtures("no_errors")
TALK = {"messages": [{"role": "user", "content": "say yes"}], "max_tokens": 3}
GOOD = request(json.dumps(TALK).encode())
LONG = request(json.dumps(TALK | {"max_tokens": 2000, "n": 30, "stream": True, "logprobs": True, "top_logprobs": 20}).encode())


@pytest.fixture
def hurried(monkeypatch):
    """Requests must arrive within half a second."""
    monkeypatch.setattr("emorl.serving.application._BODY_SECONDS", 0.5)


@pytest.fixture(params=["h11", "httptools"])
def where(request, serve, hurried):
    """A server with either reader of HTTP."""
    with serve(http=request.param) as url:
        yield url


def test_a_request_that_drips_in_is_given_up_and_others_are_answered(where):
    with Connection(where) as connection:
        connection.send(GOOD[:-40])
        dripping = threading.Thread(target=lambda: [(connection.send(b" "), time.sleep(0.05)) for _ in range(30)])
        dripping.start()
        assert chat(where).status == 200
        reply = connection.reply()
        dripping.join()
    assert reply is not None
    assert reply.status == 408
    assert "took longer than" in reply.error["message"]


def test_requests_that_never_end_keep_nobody_waiting(where):
    parts = [b"", b"P", b"POST /v1/chat/completions HTTP/1.1\r\n", GOOD[: GOOD.index(b"\r\n\r\n")], GOOD[:-1], LONG[:-1]]
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(Connection(where)) for _ in range(60)]
        for place, connection in enumerate(connections):
            connection.send(parts[place % len(parts)])
        assert chat(where).status == 200
        for connection in connections[::2]:
            connection.socket.shutdown(socket.SHUT_WR)
        assert chat(where).status == 200
    assert is_idle(where)
    assert chat(where).status == 200


def test_200_connections_at_once_are_answered_or_told_to_come_back(serve):
    for queue in (20, 200):
        with serve(queue=queue, rows=8) as url, contextlib.ExitStack() as stack:
            expected = chat(url).json["choices"]
            connections = [stack.enter_context(Connection(url)) for _ in range(200)]
            for connection in connections:
                connection.send(GOOD)
            replies = [connection.reply() for connection in connections]
            answered = [reply for reply in replies if reply is not None and reply.status == 200]
            assert all(reply.json["choices"] == expected for reply in answered)
            if queue == 200:
                assert len(answered) == 200
            others = [reply for reply in replies if reply not in answered]
            assert {(reply.status, reply.headers["retry-after"], reply.error["code"]) for reply in others if reply} <= {
                (429, "2", "queue_full")
            }
            assert None not in replies
            assert is_idle(url)


def test_a_full_queue_refuses_a_stream_before_it_begins(serve):
    with serve(rows=1, queue=1) as url, Connection(url) as running, Connection(url) as waiting:
        running.send(request(json.dumps(TALK | {"max_tokens": 2000}).encode()))
        while not health(url)["running"]:
            time.sleep(0.01)
        waiting.send(GOOD)
        while not health(url)["waiting"]:
            time.sleep(0.01)
        for fields in ({}, {"stream": True}):
            reply = chat(url, **fields)
            assert (reply.status, reply.headers["retry-after"], reply.error["type"]) == (429, "2", "rate_limit_error")


def test_a_connection_that_breaks_while_it_is_written_to_frees_its_rows(where):
    for is_reset in (False, True):
        connections = [Connection(where) for _ in range(3)]
        for connection in connections:
            connection.send(LONG)
        assert connections[0].socket.recv(1000).startswith(b"HTTP/1.1 200")
        for connection in connections:
            if is_reset:
                connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.socket.close()
        assert is_idle(where, 5)
    assert chat(where).status == 200


def test_requests_behind_each_other_on_one_connection_are_answered_in_order(where):
    lengths = [3, 1, 5, 2]
    with Connection(where) as connection:
        connection.send(b"".join(request(json.dumps(TALK | {"max_tokens": most}).encode()) for most in lengths))
        for most in lengths:
            reply = connection.reply()
            assert reply is not None
            assert reply.json["usage"]["completion_tokens"] == most


@pytest.mark.parametrize(
    "junk", [b"\0" * 1000, b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"a" * 200_000]
)
def test_junk_behind_a_request_harms_nobody(where, junk):
    with Connection(where) as connection:
        connection.send(GOOD + junk)
        reply = connection.reply()
        assert reply is None or reply.status in (200, 400)
    with Connection(where) as connection:
        connection.send(junk)
        with contextlib.suppress(OSError):  # closed already
            connection.socket.shutdown(socket.SHUT_WR)
            while connection.socket.recv(10_000):
                pass
    assert chat(where).status == 200
    assert is_idle(where)


@pytest.fixture
def process(searched):
    """`emorl serve` as a process of its own, and where it listens."""
    command = [sys.executable, "-m", "emorl", "serve", str(searched.output), "--port", "0", "serve.seconds=5"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        said = ""
        while "serving at" not in said:
            said += running.stderr.readline() or pytest.fail(said)
        yield running, re.search(r"http://127\.0\.0\.1:\d+", said)[0]  # type: ignore[index]
        running.kill()


def test_a_server_that_is_told_to_end_writes_to_the_end_what_it_began(process):
    """Also where one of its clients does not read, and another has sent half a request."""
    running, url = process
    with Connection(url) as reads, Connection(url) as stalls, Connection(url) as half, ThreadPoolExecutor(1) as pool:
        asked = TALK | {"stream": True, "max_tokens": 60}
        whole = chat(url, **(asked | {"stream": False})).json["choices"][0]
        reads.send(request(json.dumps(asked).encode()))
        stalls.send(LONG)
        half.send(GOOD[:-1])
        while health(url)["running"] < 31:
            time.sleep(0.01)
        running.terminate()
        reply = pool.submit(reads.reply).result()
        assert reply is not None
        *events, last, _ = reply.body.decode().split("\n\n")
        assert last == "data: [DONE]"
        chunks = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
        assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == whole["message"]["content"]
        assert chunks[-1]["finish_reason"] == whole["finish_reason"]
        running.communicate(timeout=60)
    assert running.returncode == -signal.SIGTERM
    _bound(Serving(port=int(url.rpartition(":")[2]))).close()
