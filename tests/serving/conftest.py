"""A finished search over a tiny random base, a server of it at a port of its own, and the page's routes over known numbers."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import BaseRoute
from starlette.testclient import TestClient
from transformers import PreTrainedTokenizerFast

from emorl.config.experiment import BaseConfig, DataConfig, Experiment, ObjectiveConfig
from emorl.config.serve import ServeConfig
from emorl.runs.layout import ENSEMBLE, Layout
from emorl.runs.results import Point, SearchResult, write_result
from emorl.serving.application import Served, make_application
from emorl.serving.engine import Engine
from emorl.serving.models import Models
from emorl.serving.preparing import Defaults, Preparing
from emorl.stages.materials import Materials
from emorl.stages.page_facts import page_of
from emorl.stages.serve import Serving, make_server
from emorl.stages.stage import keep_experiment
from tests.reporting.synthetic_run import write_run

POLICIES = {"brief": "length", "varied": "distinct_2", "fresh": "repetition"}
"""policy (and objective) -> function"""

FRONT = (
    Point({"brief": 0.0, "varied": 1.0, "fresh": 0.0}, {"brief": 0.2, "varied": 0.9, "fresh": 0.3}, 0.47),
    Point({"brief": 0.6, "varied": 0.4, "fresh": 0.0}, {"brief": 0.7, "varied": 0.5, "fresh": 0.4}, 0.53),
    Point({"brief": 0.25, "varied": 0.25, "fresh": 0.5}, {"brief": 0.4, "varied": 0.4, "fresh": 0.8}, 0.52),
)
"""as the search keeps it: in no order"""


@pytest.fixture(scope="session")
def searched(tmp_path_factory, tiny_base_dir, make_causal_model, write_adapter) -> Layout:
    """A run whose search has found the front: read only, shared by the whole session."""
    root = tmp_path_factory.mktemp("serving")
    experiment = Experiment(
        output=root / "run",
        base=BaseConfig(model=str(tiny_base_dir)),
        data=DataConfig(path=str(root / "prompts.jsonl"), validation=2, test=2),
        objectives={name: ObjectiveConfig(function=function) for name, function in POLICIES.items()},
        generation={"max_new_tokens": 12, "do_sample": False},
    )
    layout = Layout(experiment.output)
    for seed, name in enumerate(experiment.objectives):
        write_adapter(make_causal_model("llama"), layout.policy(name), seed=seed)
    keep_experiment(experiment)
    layout.search.mkdir()
    Materials(experiment).mixture().save_pretrained(layout.search / ENSEMBLE)
    best = max(FRONT, key=lambda point: point.value)
    write_result(layout.search, SearchResult("hierarchical_grid", "mean", {}, len(FRONT), None, best=best, front=FRONT))
    return layout


@contextlib.contextmanager
def serving(application: Starlette, **config: Any) -> Iterator[str]:
    """A real server of an application, in a thread; where it listens."""
    settings = {"port": 0, "log_config": None, "access_log": False, **config}
    server = uvicorn.Server(uvicorn.Config(application, **settings))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serve(searched) -> Callable[..., AbstractContextManager[str]]:
    """Factory: `with serve(directory=searched.output, key=None, generation={}, http="auto", **limits) as url`, a server of its
    own."""

    def of(
        directory: Path = searched.output, key: str | None = None, generation: Any = None, http: Any = "auto", **limits: Any
    ) -> AbstractContextManager[str]:
        return serving(make_server(directory, Serving(key=key, limits=limits, generation=generation or {})), http=http)

    return of


@pytest.fixture(scope="session")
def url(serve) -> Iterator[str]:
    """A server of the run that all tests may ask."""
    with serve() as where:
        yield where


@pytest.fixture
def no_errors(caplog) -> Iterator[None]:
    """Nothing that a test does makes a server log an error."""
    yield
    assert not [record.getMessage() for record in caplog.get_records("call") if record.levelname == "ERROR"]


@pytest.fixture(scope="session")
def preparing(tokenizer: PreTrainedTokenizerFast) -> Preparing:
    """Of a server with a chat template and no model."""
    return Preparing(Models([], []), tokenizer, Defaults({"max_new_tokens": 8, "do_sample": False}))


@pytest.fixture(scope="session")
def client_of(preparing: Preparing) -> Callable[[Sequence[BaseRoute]], TestClient]:
    """Factory: a client of an application with these routes beside its own."""

    def make(routes: Sequence[BaseRoute], **options: object) -> TestClient:
        engine = Engine(preparing.tokenizer, ServeConfig(), 2**20)
        return TestClient(make_application(Served(engine, preparing, routes=routes, **options)))  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def run_of_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("page") / "three", ("reflection", "empathy", "fluency"))


@pytest.fixture(scope="session")
def client(run_of_three: Path, preparing: Preparing, client_of: Callable[[Sequence[BaseRoute]], TestClient]) -> TestClient:
    return client_of(page_of(run_of_three, preparing))
