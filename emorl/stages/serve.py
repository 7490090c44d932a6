"""Serves a run over HTTP in OpenAI's form, a trade-off per request (`emorl serve RUN`), with a page that shows it.

RUN is an experiment's output, or a policy: an adapter, a whole model or a dynamic ensemble. Every point of the search's front
is a model by name, so that any client can choose one; clients that send fields of their own send `weights` or `prefer`.
"""

import argparse
import contextlib
import importlib.util
import math
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emorl.config import UserError
from emorl.config.experiment import load_kept_experiment
from emorl.config.serve import ServeConfig
from emorl.config.yaml import apply_overrides, as_mapping, parse
from emorl.runs.console import Console
from emorl.runs.layout import RESULT, Layout
from emorl.runs.progress import Progress
from emorl.stages.generate import Wish, check

if TYPE_CHECKING:
    from starlette.applications import Starlette

_KEY = "EMORL_API_KEY"
_LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
_SHARE_OF_FREE = 1 / 3
_GIB = 2**30

_EXAMPLE = """
A request chooses its trade-off by the model's name, or by a field of its own:

  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "emorl/front/3", "messages": [{"role": "user", "content": "I cannot sleep."}]}'
  … -d '{"model": "emorl", "prefer": {"reflection": 0.7, "empathy": 0.3}, "messages": […]}'

Models: emorl/best · emorl/front/N · emorl/NAME=WEIGHT,… (hidden states are averaged) · emorl/soup/… (parameters are) ·
emorl/policy/NAME · emorl/base · emorl/distilled · emorl/fused · emorl/dynamic. GET /v1/models lists those that there are.
"""


@dataclass(frozen=True)
class Serving:
    """How a run is served: where, to whom, and with which settings instead of the experiment's."""

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)


def make_server(directory: Path, serving: Serving, progress: Progress | None = None) -> "Starlette":
    """The application of a run, with all that it serves loaded.

    Raises:
        UserError: nothing to serve there, or settings that cannot be.
    """
    limits = _limits(directory, serving)
    check(directory, Wish())
    from emorl.serving.application import Served, make_application
    from emorl.serving.engine import Engine
    from emorl.stages.page_facts import page_of
    from emorl.stages.served import load_served

    preparing = load_served(directory, Wish(generation=serving.generation), limits.longest_prompt, progress)
    memory = _free_memory() * _SHARE_OF_FREE if limits.memory is None else limits.memory * _GIB
    result = Layout(directory).search / RESULT
    served = Served(
        Engine(preparing.tokenizer, limits, int(memory)),
        preparing,
        serving.key,
        _LOOPBACK if serving.host in _LOOPBACK else None,
        page_of(directory, preparing),
        created=int(result.stat().st_mtime) if result.is_file() else 0,
    )
    return make_application(served)


def _limits(directory: Path, serving: Serving) -> ServeConfig:
    """The block `serve` of the run's experiment, as the command changed it."""
    kept = as_mapping(load_kept_experiment(directory).serve) if Layout(directory).experiment.is_file() else {}
    return parse(ServeConfig, {**kept, **serving.limits}, "serve")


def _free_memory() -> int:
    import psutil
    import torch

    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def add_options(parser: argparse.ArgumentParser) -> None:
    where = "output directory of an experiment, or a policy: an adapter, a whole model or a dynamic ensemble"
    parser.add_argument("directory", type=Path, metavar="RUN", help=where)
    setting = "settings that replace the experiment's, such as serve.rows=8 or generation.max_new_tokens=200"
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help=setting)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is every one [127.0.0.1]")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at; 0 takes any that is free [8000]")
    what = f"environment variable that holds the key which clients must send; by default {_KEY}, where it is set"
    parser.add_argument("--api-key", default=None, metavar="VARIABLE", help=what)
    parser.epilog = _EXAMPLE


def command(options: argparse.Namespace) -> None:
    if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("uvicorn") is None:
        raise UserError("serving needs starlette and uvicorn: pip install 'emorl[serve]'")
    blocks = _blocks(options.overrides)
    key = _key(options.api_key)
    serving = Serving(options.host, options.port, key, blocks.get("serve", {}), blocks.get("generation", {}))
    console, seconds = Console(), _limits(options.directory, serving).seconds
    check(options.directory, Wish())
    bound = _bound(serving)
    if key is None and serving.host not in _LOOPBACK:
        console.warn(f"anyone who reaches {serving.host} may use this server; --api-key asks them for a key")
    with bound:
        _run(make_server(options.directory, serving, console), bound, seconds, console)


def _run(application: "Starlette", bound: socket.socket, seconds: float, console: Console) -> None:
    import uvicorn

    host, port = bound.getsockname()[:2]
    named = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    where = f"http://{named}:{port}"
    config = uvicorn.Config(application, log_level="warning", access_log=False, timeout_graceful_shutdown=math.ceil(seconds))
    bound.listen()  # whoever reads the line may come
    console.say(f"serving at {where}/v1 (OpenAI's interface) and {where}/ (the page); Ctrl-C ends it")
    with contextlib.suppress(KeyboardInterrupt):  # raised again, when what ran has finished
        uvicorn.Server(config).run(sockets=[bound])


def _bound(serving: Serving) -> socket.socket:
    """The socket, taken before anything loads: a port that is in use is told at once."""
    if not 0 <= serving.port < 2**16:
        raise UserError(f"--port {serving.port}: expected 0 to {2**16 - 1}")
    with contextlib.ExitStack() as on_failure:
        try:
            places = socket.getaddrinfo(serving.host, serving.port, type=socket.SOCK_STREAM)
            family, *_, address = min(places, key=lambda place: place[0] != socket.AF_INET)
            bound = on_failure.enter_context(socket.socket(family, socket.SOCK_STREAM))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError as error:
            where = f"{serving.host}:{serving.port}"
            raise UserError(f"cannot listen at {where} ({error}); choose another --host or --port") from None
        on_failure.pop_all()
        return bound


def _key(variable: str | None) -> str | None:
    """The key in an environment variable; None where none is asked for."""
    key = os.environ.get(variable or _KEY)
    if variable is not None and not key:
        raise UserError(f"--api-key {variable}: the environment variable {variable} is not set; export the key in it")
    return key or None


def _blocks(overrides: Sequence[str]) -> dict[str, Any]:
    content = apply_overrides({}, overrides)
    for name, block in content.items():
        if name not in ("serve", "generation") or not isinstance(block, Mapping):
            raise UserError(f"{name}: only serve.… and generation.… can be changed here, such as serve.rows=8")
    return content
