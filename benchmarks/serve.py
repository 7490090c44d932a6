"""What does the server give to 1, 4 and 16 clients at once, each with weights of its own, and when does the first token come?

Against it, in the same run and turn by turn: one client that sends the same requests one after the other, the same server over
one policy, and `transformers serve` over that policy merged into its base (it has no weights to choose). The base is real
(`recipes/real_model/prepare.py` makes its folder), its adapters are random: speed does not depend on their values. No text
ends before its last token, no two prompts are alike behind their system turn. Beside the ratios stands the bound: what a step
costs that only multiplies so many rows with every linear layer of the base. A ratio is the median over repeats of the ratio
inside one repeat.

    python -m benchmarks.serve --base runs/models/smollm2 --clients 1 4 16 --repeats 3
    python -m benchmarks.serve --base runs/models/smollm2 --transformers     # needs transformers[serving]
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # clients and server are two processes

import httpx2
import torch
import uvicorn
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.decode import TARGETS
from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.config.serve import ServeConfig
from emorl.policies.adapters import read_adapter
from emorl.runs.results import Point
from emorl.serving.application import Served, make_application
from emorl.serving.engine import Engine
from emorl.serving.models import Models, Steered
from emorl.serving.preparing import Defaults, Preparing
from emorl.serving.voices import Voice

_WORDS = [
    "the",
    "letter",
    "that",
    "came",
    "today",
    "says",
    "nothing",
    "of",
    "what",
    "we",
    "agreed",
    "on",
    "whom",
    "shall",
    "I",
    "ask",
]
_WAIT_SECONDS = 180.0


@dataclass(frozen=True)
class Load:
    """So many clients, each sending requests one after the other."""

    clients: int
    requests: int
    new_tokens: int


@dataclass(frozen=True)
class Measured:
    """Tokens per second of all clients together, and the median seconds to a request's first token."""

    tokens_per_second: float
    first_token: float


def make_folders(base: str, policies: int, folder: Path) -> None:
    """Random adapters of a base, and the first one merged into it, without an end token: texts have their full length."""
    model = _endless(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    tokenizer = AutoTokenizer.from_pretrained(base)
    for index in range(policies):
        torch.manual_seed(index)
        adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.005)
        adapted.save_pretrained(str(folder / f"policy{index}"))
        model = adapted.unload()
    merged = PeftModel.from_pretrained(model, str(folder / "policy0")).merge_and_unload()
    merged.save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")


def _endless(model: PreTrainedModel) -> PreTrainedModel:
    model.config.eos_token_id = None
    model.generation_config.eos_token_id = None
    return model


def serve(base: str, folder: Path, policies: int, rows: int, port: int) -> None:
    """What the child process does: the application over `policies` of the adapters."""
    torch.set_num_threads(os.cpu_count() or 1)
    model = _endless(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    adapters = {f"policy{index}": read_adapter(folder / f"policy{index}") for index in range(policies)}
    ensemble = HiddenStateEnsemble(model, adapters)
    equal = Point(dict.fromkeys(adapters, 1 / policies), {}, 0.0)
    steered = Steered("", [equal], equal, list(adapters), lambda weights: Voice(ensemble, weights))
    preparing = Preparing(Models([steered], []), tokenizer, Defaults({"max_new_tokens": 64}))
    engine = Engine(tokenizer, ServeConfig(rows=rows, queue=1000), 4 * 2**30)
    uvicorn.run(make_application(Served(engine, preparing)), port=port, log_level="warning", access_log=False)


@contextmanager
def server(command: Sequence[str], port: int) -> Iterator[None]:
    """A server in a process of its own, from when it answers."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < end and process.poll() is None:
            try:
                httpx2.get(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except httpx2.HTTPError:
                time.sleep(0.3)
        else:
            raise SystemExit(f"the server did not start: {' '.join(command)}")
        yield
    finally:
        process.terminate()
        process.wait()


def request(
    model: str, clients: int, client: int, number: int, policies: int, new_tokens: int, has_weights: bool
) -> dict[str, Any]:
    """A chat of its own words, with weights that nobody else has."""
    words = [_WORDS[(client * 7 + number * 3 + place * (client + 1)) % len(_WORDS)] for place in range(16)]
    text = f"{clients} {client} {number} {' '.join(words)}"
    content: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}], "stream": True}
    if has_weights and policies > 1:
        first = 0.1 + 0.8 * ((client * 37 + number * 11) % 97) / 97
        content["weights"] = {"policy0": first} | {f"policy{k}": (1 - first) / (policies - 1) for k in range(1, policies)}
    return {**content, "max_tokens": new_tokens, "temperature": 0}


async def drive(port: int, model: str, load: Load, policies: int, has_weights: bool) -> Measured:
    """All clients at once."""
    firsts: list[float] = []

    async def client(number: int, session: httpx2.AsyncClient) -> None:
        for each in range(load.requests):
            content = request(model, load.clients, number, each, policies, load.new_tokens, has_weights)
            start, is_first = time.perf_counter(), True
            async with session.stream("POST", "/v1/chat/completions", json=content) as response:
                async for line in response.aiter_lines():
                    if is_first and line.startswith("data: {") and _has_text(line):
                        firsts.append(time.perf_counter() - start)
                        is_first = False
                response.raise_for_status()

    limits = httpx2.Limits(max_connections=load.clients)
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits) as session:
        start = time.perf_counter()
        await asyncio.gather(*(client(number, session) for number in range(load.clients)))
        seconds = time.perf_counter() - start
    return Measured(load.clients * load.requests * load.new_tokens / seconds, statistics.median(firsts))


def _has_text(line: str) -> bool:
    choices = json.loads(line.removeprefix("data: "))["choices"]
    return bool(choices and choices[0]["delta"].get("content"))


def bound(base: str, rows: Sequence[int], repeats: int = 7) -> dict[int, float]:
    """Seconds of every linear layer of the base for so many rows of one token each."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    found = {}
    for count in rows:
        inputs = [torch.randn(count, linear.in_features) for linear in linears]
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for linear, x in zip(linears, inputs, strict=True):
                nn.functional.linear(x, linear.weight)
            times.append(time.perf_counter() - start)
        found[count] = statistics.median(times)
    return found


def measure(options: argparse.Namespace, folder: Path) -> dict[str, dict[int, list[Measured]]]:
    """Way -> clients -> what each repeat measured. All servers run, one at a time has work."""
    ways: dict[str, tuple[int, list[str], str, int, bool]] = {}
    this = [sys.executable, "-m", "benchmarks.serve", "--base", options.base, "--serve", str(folder)]
    for place, policies in enumerate(dict.fromkeys([options.policies, 1])):
        port = options.port + place
        command = [*this, "--policies", str(policies), "--port", str(port)]
        ways[f"K = {policies}"] = (port, command, "emorl", policies, True)
    if options.transformers:
        port = options.port + 9
        command = ["transformers", "serve", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
        ways["transformers serve"] = (port, command, str(folder / "merged"), 1, False)
    found: dict[str, dict[int, list[Measured]]] = {}
    for repeat in range(options.repeats):
        for way, (port, command, model, policies, has_weights) in ways.items():
            with server(command, port):
                asyncio.run(drive(port, model, Load(1, 1, 8), policies, has_weights))  # warm
                for clients in options.clients:
                    load = Load(clients, max(1, options.requests // clients), options.new_tokens)
                    measured = asyncio.run(drive(port, model, load, policies, has_weights))
                    found.setdefault(way, {}).setdefault(clients, []).append(measured)
                    print(f"repeat {repeat}, {way}, {clients} clients: {measured}", file=sys.stderr, flush=True)
    return found


def table(found: Mapping[str, Mapping[int, Sequence[Measured]]]) -> list[str]:
    """Markdown, a line for each way and number of clients."""
    lines = [
        "| server | clients | tokens/s | first token s | one after the other × | time / one policy |",
        "|---|---|---|---|---|---|",
    ]
    single = found["K = 1"]
    for way, by_clients in found.items():
        for clients, repeats in by_clients.items():
            alone = [repeat.tokens_per_second for repeat in by_clients[1]] if 1 in by_clients else []
            speed = [repeat.tokens_per_second for repeat in repeats]
            gain = _median_ratio(speed, alone)
            price = _median_ratio([repeat.tokens_per_second for repeat in single[clients]], speed)
            first = statistics.median(repeat.first_token for repeat in repeats)
            lines.append(f"| {way} | {clients} | {statistics.median(speed):.1f} | {first:.2f} | {gain} | {price} |")
    return lines


def _median_ratio(above: Sequence[float], below: Sequence[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(above, below, strict=True)):.2f}" if below else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="runs/models/smollm2", help="folder of a real decoder")
    parser.add_argument("--policies", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=16, help="in all, shared by the clients; each sends one at least")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--transformers", action="store_true", help="measure `transformers serve` too")
    parser.add_argument("--port", type=int, default=8711)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.base, options.serve, options.policies, 64, options.port)
        return
    with tempfile.TemporaryDirectory() as directory:
        make_folders(options.base, options.policies, Path(directory))
        found = measure(options, Path(directory))
    rows = sorted({clients * policies for clients in options.clients for policies in (1, options.policies)})
    print("\n".join(table(found)))
    print("\nevery linear layer once, seconds by rows:")
    print(", ".join(f"{count}: {seconds * 1000:.0f} ms" for count, seconds in bound(options.base, rows).items()))


if __name__ == "__main__":
    main()
