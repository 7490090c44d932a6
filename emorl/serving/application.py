"""The server as an ASGI application: OpenAI's routes over one engine, its errors in OpenAI's form, and the page.

Nothing a request says is run or opened: templates, models and files are the run's own. A request is JSON by its content type,
so that no page of another site can send one unasked.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from emorl.config import UserError
from emorl.serving.answers import Answer, error
from emorl.serving.engine import Engine
from emorl.serving.headers import with_security_headers
from emorl.serving.jobs import Asked, BusyError, Event, Failed, PromptScores, Written
from emorl.serving.models import Model, UnknownModelError
from emorl.serving.preparing import Preparing
from emorl.serving.requests import ChatRequest, CompletionRequest, FieldError, parse

logger = logging.getLogger(__name__)

MOST_BYTES = 2**22  # of a request's body
_BODY_SECONDS = 30.0
_CLOSING_SECONDS = 30.0
_RETRY_SECONDS = 2


@dataclass(frozen=True, eq=False)
class Served:
    """What the application answers with.

    Args:
        key: that requests must carry; None: none.
        hosts: names by which a request may call this server; None: any.
        routes: further ones, such as the page's.
        created: when the run's search ended, in seconds since 1970.
    """

    engine: Engine
    preparing: Preparing
    key: str | None = None
    hosts: Sequence[str] | None = None
    routes: Sequence[BaseRoute] = ()
    created: int = 0


def make_application(served: Served) -> Starlette:
    """The application; it starts the engine and closes it."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        served.engine.start()
        yield
        await run_in_threadpool(served.engine.close, _CLOSING_SECONDS)

    routes = [
        Route("/v1/models", _models),
        Route("/v1/models/{name:path}", _model),
        Route("/v1/chat/completions", _answering(ChatRequest), methods=["POST"]),
        Route("/v1/completions", _answering(CompletionRequest), methods=["POST"]),
        Route("/health", _health),
        *served.routes,
    ]
    guards = [Middleware(with_security_headers), Middleware(Guard, key=served.key, hosts=served.hosts)]
    refusals: dict[Any, Any] = {
        HTTPException: _refused_by_starlette,
        UserError: _refused,
        BusyError: _busy,
        _FailedError: _failed,
        ClientDisconnect: _gone,
        Exception: _unforeseen,
    }
    application = Starlette(routes=routes, middleware=guards, exception_handlers=refusals, lifespan=lifespan)
    application.router.redirect_slashes = False
    application.state.served = served
    return application


class Guard:
    """Lets nobody in who calls this server by another's name, nor to `/v1/` without the key."""

    def __init__(self, app: Any, key: str | None, hosts: Sequence[str] | None) -> None:
        self._app, self._hosts = app, None if hosts is None else [name.encode() for name in hosts]
        self._key = None if key is None else key.encode(errors="surrogateescape")  # as the environment gave it

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Any) -> Response | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").rpartition(b":")[0] or headers.get(b"host", b"")
        if self._hosts is not None and host.lower() not in self._hosts:
            return _refusal("this server has another name; the header Host must be that of its address", 400, code="wrong_host")
        if self._key is None or not scope["path"].startswith("/v1/"):
            return None
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key):
            return None
        return _refusal("this server asks for its key: Authorization: Bearer KEY", 401, code="invalid_api_key")


def _served(request: Request) -> Served:
    return request.app.state.served


async def _models(request: Request) -> Response:
    served = _served(request)
    return JSONResponse(
        {"object": "list", "data": [_listed(model, served.created) for model in served.preparing.models.listed()]}
    )


async def _model(request: Request) -> Response:
    served = _served(request)
    return JSONResponse(_listed(served.preparing.models.find(request.path_params["name"]), served.created))


def _listed(model: Model, created: int) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": created, "owned_by": "emorl", "emorl": model.described}


async def _health(request: Request) -> Response:
    engine = _served(request).engine
    return JSONResponse({"status": "ok", "running": engine.running, "waiting": engine.waiting})


def _answering(kind: type[ChatRequest] | type[CompletionRequest]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        served, asked = _served(request), parse(kind, await read_body(request))
        begun, wanted = await run_in_threadpool(served.preparing.prepare, asked)
        work = _Work(served.engine, begun, wanted)
        watch = asyncio.create_task(work.leave_with(request))
        if asked.stream:
            return StreamingResponse(
                work.stream(watch, asked.tells_usage), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        try:
            return JSONResponse(await work.finish())
        finally:
            work.leave()
            watch.cancel()

    return answer


class _Work:
    """A request's jobs, and what comes of them.

    Raises:
        BusyError: the engine takes nothing more; none of the jobs stays.
    """

    def __init__(self, engine: Engine, answer: Answer, wanted: Sequence[Asked]) -> None:
        self._answer = answer
        self._events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self._left = sum(each.samples for each in wanted)
        loop = asyncio.get_running_loop()

        def deliver(prompt: int, event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._events.put_nowait, (prompt, event))

        self._jobs = engine.submit(wanted, deliver)

    def leave(self) -> None:
        """Nobody waits any more."""
        for job in self._jobs:
            job.is_gone = True

    async def leave_with(self, request: Request) -> None:
        """Leaves when the client goes away."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.leave()
        self._events.put_nowait(None)

    async def finish(self) -> dict[str, Any]:
        """The whole answer."""
        async for prompt, event in self._arriving():
            self._answer.add(prompt, event)
        return self._answer.whole()

    async def stream(self, watch: "asyncio.Task[None]", tells_usage: bool) -> AsyncIterator[str]:
        """Events of the server; a failure is the last one."""
        try:
            async for prompt, event in self._arriving():
                if (chunk := self._answer.chunk(prompt, event)) is not None:
                    yield _event(chunk)
            if tells_usage:
                yield _event(self._answer.usage_chunk())
            yield "data: [DONE]\n\n"
        except _FailedError as failure:
            yield _event(error(str(failure), 500))
        except ClientDisconnect:
            return  # nobody reads it
        finally:
            self.leave()
            watch.cancel()

    async def _arriving(self) -> AsyncIterator[tuple[int, Written | PromptScores]]:
        """What is written, with the number of its prompt, until all has ended."""
        while self._left:
            taken = await self._events.get()
            if taken is None:
                raise ClientDisconnect
            prompt, event = taken
            if isinstance(event, Failed):
                raise _FailedError(event.message)
            self._left -= isinstance(event, Written) and event.end is not None
            yield prompt, event


class _FailedError(Exception):
    """The engine could not answer."""


async def read_body(request: Request, most: int = MOST_BYTES) -> bytes:
    """A request's body of JSON.

    Raises:
        HTTPException: it is no JSON by its content type (415), too large (413), or comes too slowly (408).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, "send JSON, with the header Content-Type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise HTTPException(413, f"the request is larger than {most:,} bytes")
    except TimeoutError:
        raise HTTPException(408, f"the request took longer than {_BODY_SECONDS:.0f} s to arrive") from None
    return bytes(body)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"


def _refusal(message: str, status: int, field: str | None = None, code: str | None = None) -> JSONResponse:
    headers = {"Retry-After": str(_RETRY_SECONDS)} if status in (429, 503) else {}
    return JSONResponse(error(message, status, field, code), status, headers)


async def _refused(_: Request, refusal: Exception) -> Response:
    if isinstance(refusal, UnknownModelError):
        return _refusal(str(refusal), 404, "model", "model_not_found")
    field = refusal.field if isinstance(refusal, FieldError) else _field_of(str(refusal))
    return _refusal(str(refusal), 400, field)


def _field_of(message: str) -> str | None:
    """The field that a message begins with."""
    first = re.match(r"(\w+)[:=]", message)
    return first and first[1]


async def _refused_by_starlette(_: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, HTTPException)
    response = _refusal(refusal.detail, refusal.status_code)
    response.headers.update(refusal.headers or {})
    return response


async def _busy(_: Request, refusal: Exception) -> Response:
    return _refusal(f"{refusal}; try again later", 429, code="queue_full")


async def _failed(_: Request, failure: Exception) -> Response:
    return _refusal(str(failure), 500)


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _unforeseen(_: Request, __: Exception) -> Response:
    return _refusal("the server failed on this request; its log says more", 500)
