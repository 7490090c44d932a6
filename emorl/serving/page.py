"""The page of `emorl serve`: its files and the facts of the run that it shows.

The page is a client of `/v1/*` like any other. Its files are read once, when the application is made; they hold nothing of the
run, so they need no key.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from emorl.runs.results import Point, as_json
from emorl.serving.scores import AnswerScores

_FOLDER = Path(__file__).with_name("page")
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


@dataclass(frozen=True)
class Histogram:
    """How the scores of an objective spread over equal bins from `low` to `high`."""

    low: float
    high: float
    counts: Sequence[int]


@dataclass(frozen=True)
class PageFacts:
    """What the page shows of a run beside its models (`/v1/models`).

    Args:
        output: the run, as it was given.
        chat: whether it reads conversations.
        front: in order of falling value, as `emorl/front/N` counts; `best` is the index of its best point.
        generation: settings of decoding, where a request has none, as `system_prompt`.
        commands: kind of model -> beginning and end of the command that answers as it does without a server; one that ends in
            `--weights` wants these behind it.
        scored: objectives that score an answer at once.
        not_scored: each other one -> why it does not, as the end of a sentence.
        scores: how the answers of all systems to the test prompts scored, where that was measured.
        prompts: a few test prompts.
    """

    output: str
    chat: bool
    objectives: Sequence[str]
    policies: Sequence[str]
    front: Sequence[Point]
    best: int | None
    generation: Mapping[str, Any]
    system_prompt: str | None
    commands: Mapping[str, tuple[str, str]]
    scored: Sequence[str]
    not_scored: Mapping[str, str]
    scores: Mapping[str, Histogram]
    prompts: Sequence[str]


def page_routes(facts: PageFacts, scores: AnswerScores) -> list[Route]:
    """The page's files, which need no key, and what it asks for under `/v1/emorl/`: the facts, and scores of answers."""
    files = [
        Route("/" if file.stem == "index" else f"/{file.name}", _always(Response(file.read_bytes(), media_type=kind)))
        for file in sorted(_FOLDER.iterdir())
        if (kind := _TYPES.get(file.suffix))
    ]
    run = Route("/v1/emorl/run", _always(JSONResponse(as_json(facts))))
    return [*files, run, Route("/v1/emorl/scores", scores.answer, methods=["POST"])]


def _always(response: Response) -> Callable[[Request], Awaitable[Response]]:
    async def answer(_: Request) -> Response:
        return response

    return answer
