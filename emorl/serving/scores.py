"""Answers under a run's own objectives, for whoever reads them: `POST /v1/emorl/scores`.

`{"prompt": text or turns, "completions": [text, …]}` becomes `{"scores": [{objective: score or null}, …], "problems":
{objective: sentence}}`, on the scale of search and evaluation. Objectives load when they are first asked for, and score away
from the event loop, one request after the other.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse

from emorl.config import UserError
from emorl.objectives.loading import Objective
from emorl.policies.conversation import as_completion, as_prompt, prompt_text
from emorl.serving.application import read_body
from emorl.serving.jobs import BusyError
from emorl.serving.requests import Turn, parse

logger = logging.getLogger(__name__)

_MOST_BYTES, _MOST_COMPLETIONS, _MOST_WAITING = 200_000, 16, 8


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str | Annotated[list[Turn], Field(min_length=1)]
    completions: Annotated[list[str], Field(min_length=1, max_length=_MOST_COMPLETIONS)]


class AnswerScores:
    """Scores answers to any prompt.

    Args:
        load: name -> what loads the objective, for those that need neither the data's columns nor money.
        chat: whether the run's prompts are conversations.
    """

    def __init__(self, load: Mapping[str, Callable[[], Objective]], chat: bool) -> None:
        self._load, self._chat = load, chat
        self._loaded: dict[str, Objective] = {}
        self._turn = CapacityLimiter(1)

    async def answer(self, request: Request) -> JSONResponse:
        """The endpoint.

        Raises:
            FieldError: the request says something else.
            BusyError: too many wait.
        """
        asked = parse(_Asked, await read_body(request, _MOST_BYTES))
        if self._turn.statistics().tasks_waiting >= _MOST_WAITING:
            raise BusyError(f"{_MOST_WAITING} requests wait for their scores")
        prompt = asked.prompt if isinstance(asked.prompt, str) else [turn.plain for turn in asked.prompt]
        return JSONResponse(await to_thread.run_sync(self.score, prompt, asked.completions, limiter=self._turn))

    def score(self, prompt: Any, completions: Sequence[str]) -> dict[str, Any]:
        """Scores by objective of each completion. An objective that fails gives none, and a sentence in `problems`."""
        if isinstance(prompt, str) or not self._chat:
            prompt = as_prompt(prompt_text(prompt), self._chat)
        answers = [as_completion(prompt, text) for text in completions]
        scores: list[dict[str, float | None]] = [{} for _ in answers]
        problems = {}
        for name, load in self._load.items():
            try:
                objective = self._loaded.get(name) or self._loaded.setdefault(name, load())
                found = objective([prompt] * len(answers), answers)
            except UserError as error:
                logger.warning("scores: %s", error)
                found, problems[name] = [None] * len(answers), "it failed on this answer; the server's log says more"
            for row, score in zip(scores, found, strict=True):
                row[name] = score
        return {"scores": scores, "problems": problems}
