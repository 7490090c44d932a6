"""Requests as bytes on a socket: what no well-behaved client would send."""

import contextlib
import json
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any, Self
from urllib.parse import urlsplit

JSON = ((b"Content-Type", b"application/json"),)
CHAT, COMPLETIONS = b"/v1/chat/completions", b"/v1/completions"
_SECONDS = 60.0


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """In OpenAI's form, all of it."""
        error = self.json["error"]
        assert set(self.json) == {"error"}
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert len(error["message"]) < 1000
        assert "Traceback" not in error["message"]
        return error


def request(
    body: bytes = b"",
    target: bytes = CHAT,
    method: bytes = b"POST",
    headers: Iterable[tuple[bytes, bytes]] = JSON,
    host: bytes = b"127.0.0.1",
) -> bytes:
    sent = [(b"Host", host), (b"Content-Length", b"%d" % len(body)), *headers]
    return b"%s %s HTTP/1.1\r\n%s\r\n%s" % (method, target, b"".join(b"%s: %s\r\n" % each for each in sent), body)


class Connection:
    """One to a server; `with` closes it."""

    def __init__(self, url: str) -> None:
        where = urlsplit(url)
        self.socket = socket.create_connection((where.hostname, where.port), timeout=_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Sends; a server that has heard enough may have closed."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data)

    def reply(self, method: bytes = b"POST") -> Reply | None:
        """The next one, to its end; None where the server closes without one."""
        response = HTTPResponse(self.socket, method=method.decode("latin-1"))
        try:
            response.begin()
            return Reply(response.status, dict(response.headers), response.read())
        except (HTTPException, ConnectionResetError):
            return None


def ask(url: str, data: bytes, method: bytes = b"POST") -> Reply | None:
    """The answer to one request over a connection of its own."""
    with Connection(url) as connection:
        connection.send(data)
        return connection.reply(method)


def chat(url: str, **fields: Any) -> Reply:
    """A well-formed request."""
    asked = {"messages": [{"role": "user", "content": "say yes"}], "max_tokens": 3, **fields}
    reply = ask(url, request(json.dumps(asked).encode()))
    assert reply is not None
    return reply


def is_idle(url: str, seconds: float = 10.0) -> bool:
    """Whether a server comes to have nothing more to write."""
    end = time.monotonic() + seconds
    while health(url) != {"status": "ok", "running": 0, "waiting": 0}:
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def health(url: str) -> Any:
    reply = ask(url, request(target=b"/health", method=b"GET"), b"GET")
    assert reply is not None
    return reply.json
