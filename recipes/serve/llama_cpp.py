"""Does llama.cpp say what emorl says? A run's policies as GGUF LoRAs in a real llama-server, token for token.

Every prompt is answered greedily by `ParameterAverage` and, as the same token ids, by llama-server under the same scales. Both
compute in float32 (base, adapters and keys and values), so what differs are sums in another order.

    python convert_hf_to_gguf.py BASE --outtype f32 --outfile base.gguf          # a script of llama.cpp's
    python -m recipes.serve.llama_cpp RUN base.gguf --llama-server build/bin/llama-server
    python -m recipes.serve.llama_cpp RUN base.gguf --random 0.05                # adapters that change every token
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from emorl.aggregation.ensemble import ParameterAverage
from emorl.config import UserError
from emorl.config.experiment import Experiment, load_kept_experiment
from emorl.fusion.export_card import Exported
from emorl.fusion.gguf_lora import export_gguf_lora
from emorl.objectives.preference import parse_numbers
from emorl.policies.adapters import Adapter
from emorl.policies.base import Base, load_base, read_policies
from emorl.policies.generation import end_tokens
from emorl.policies.prompts import token_ids
from emorl.runs.layout import Layout
from emorl.stages.materials import Materials

SERVER = "LLAMA_SERVER"
"""environment: the program, where it is not on the PATH"""
_IN_FLOAT32 = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")
_SECONDS_TO_START = 120


def find_server(given: str | None = None) -> str | None:
    """The program llama-server: the one given, that of the environment, or the one on the PATH."""
    return given or os.environ.get(SERVER) or shutil.which("llama-server")


class LlamaServer:
    """A running llama-server, asked over HTTP."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def ask(self, path: str, content: Any = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.loads(answer.read())

    def greedy(self, ids: Sequence[int], scales: Sequence[float], new_tokens: int) -> list[int]:
        """Tokens behind a prompt of token ids, with the adapters at these scales."""
        lora = [{"id": index, "scale": scale} for index, scale in enumerate(scales)]
        asked = {"prompt": list(ids), "n_predict": new_tokens, "temperature": 0, "return_tokens": True, "lora": lora}
        return self.ask("/completion", {**asked, "cache_prompt": False})["tokens"]

    def chat_ids(self, turns: Sequence[Mapping[str, str]]) -> list[int]:
        """A conversation as the server renders and reads it."""
        text = self.ask("/apply-template", {"messages": list(turns)})["prompt"]
        return self.ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]


@contextmanager
def serving(program: str, base: Path, adapters: Sequence[Path], options: Sequence[str] = _IN_FLOAT32) -> Iterator[LlamaServer]:
    """llama-server with a base and adapters, on a free port, until the block ends.

    Raises:
        UserError: it ends, or does not answer in time; with its last words.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [program, "-m", str(base), "--port", str(port), "--parallel", "1", "--threads", "2", "--no-warmup", *options]
    loras = ["--lora", ",".join(map(str, adapters)), "--lora-init-without-apply"] if adapters else []
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen([*words, *loras], stdout=log, stderr=log) as process:
        server = LlamaServer(port)
        try:
            _wait(server, process, log)
            yield server
        finally:
            process.terminate()


def _wait(server: LlamaServer, process: subprocess.Popen[bytes], log: Any) -> None:
    end = time.monotonic() + _SECONDS_TO_START
    while process.poll() is None and time.monotonic() < end:
        try:
            server.ask("/health")
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    log.seek(0)
    last = next((line.strip() for line in reversed(log.read().splitlines()) if line.strip()), "nothing said")
    raise UserError(f"llama-server does not answer: {last:.300}")


@dataclass(frozen=True)
class Agreement:
    """How many of the tokens compared are the same, in how many texts, and how many are the base's too."""

    tokens: int
    same: int
    texts: int
    same_texts: int
    as_base: int

    @classmethod
    def of(cls, ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], base: Sequence[Sequence[int]]) -> Self:
        """Of texts as token ids, position by position."""
        return cls(
            tokens=sum(max(len(one), len(other)) for one, other in zip(ours, theirs, strict=True)),
            same=_common(ours, theirs),
            texts=len(ours),
            same_texts=sum(list(one) == list(other) for one, other in zip(ours, theirs, strict=True)),
            as_base=_common(ours, base),
        )


def _common(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> int:
    return sum(one == other for pair in zip(ours, theirs, strict=True) for one, other in zip(*pair, strict=False))


@torch.no_grad()
def greedy(
    mixture: ParameterAverage, tokenizer: Any, prompts: Sequence[list[int]], scales: Sequence[float], new_tokens: int
) -> list[list[int]]:
    """What follows each prompt, up to and with an end token; the base, which the mixture includes, has weight 0 (1 where all
    scales are 0)."""
    rows = tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt")
    weights = [*scales, 0.0 if any(scales) else 1.0]
    written = mixture.generate(**rows, weights=weights, max_new_tokens=new_tokens, do_sample=False)
    ends = set(end_tokens(mixture, tokenizer))
    texts = written[:, rows["input_ids"].shape[1] :].tolist()
    return [text[: next((index + 1 for index, one in enumerate(text) if one in ends), len(text))] for text in texts]


def random_adapters(like: Mapping[str, Adapter], size: float, seed: int = 0) -> dict[str, Adapter]:
    """Adapters of the same shapes with random factors, whose products have entries of this standard deviation."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        deviation = (size / a.shape[1] ** 0.5) ** 0.5
        return (
            torch.randn(a.shape, generator=generator) * deviation,
            torch.randn(b.shape, generator=generator) * deviation,
        )

    return {
        name: replace(adapter, factors={module: drawn(*pair) for module, pair in adapter.factors.items()})
        for name, adapter in like.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output of an experiment whose policies are trained")
    parser.add_argument("base", type=Path, help="its base as an F32 GGUF")
    parser.add_argument("--llama-server", help=f"the program ({SERVER}, or that on the PATH)")
    parser.add_argument("--weights", action="append", metavar="NAME=NUMBER,…", help="a trade-off (repeatable)")
    parser.add_argument("--random", type=float, metavar="SIZE", help="random adapters, whose products deviate so much")
    what = "decode as llama-server does by default: keys and values in float16, flash attention"
    parser.add_argument("--defaults", action="store_true", help=what)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args(arguments)
    try:
        _measure(options)
    except UserError as error:
        print(f"llama_cpp: {error}", file=sys.stderr)
        return 2
    return 0


def _measure(options: argparse.Namespace) -> None:
    program = find_server(options.llama_server)
    if program is None:
        raise UserError(f"no llama-server on the PATH; give --llama-server, or set {SERVER}")
    experiment = load_kept_experiment(options.run)
    base = load_base(replace(experiment.base, dtype="float32"))
    folders = Layout(experiment.output, experiment.policies).trained(experiment.policy_names)
    adapters = read_policies(folders, base, experiment.ensemble.adapter_scale)
    if options.random is not None:
        adapters = random_adapters(adapters, options.random)
    prompts = prompts_of(experiment, options.prompts)
    first = list(adapters)
    given = options.weights or [f"{first[0]}=0.7,{first[-1]}=0.3", ",".join(f"{name}={1 / len(first)!r}" for name in first)]
    trade_offs = [parse_numbers("--weights", one) for one in given]
    with tempfile.TemporaryDirectory() as folder:
        what = Exported(adapters, dict.fromkeys(adapters, 1.0), str(experiment.base.model), base.model.config, "llama_cpp")
        facts = export_gguf_lora(what, Path(folder), Path(folder), [])
        files = [Path(folder) / name for name in facts["files"]]
        with serving(program, options.base, files, () if options.defaults else _IN_FLOAT32) as server:
            _report(server, base, adapters, prompts, trade_offs, options.tokens)


def prompts_of(experiment: Experiment, count: int) -> list[Any]:
    """Test prompts first, then those of validation and training."""
    splits = Materials(experiment).splits
    return [*splits.test["prompt"], *splits.validation["prompt"], *splits.train["prompt"]][:count]


def _report(
    server: LlamaServer,
    base: Base,
    adapters: Mapping[str, Adapter],
    prompts: Sequence[Any],
    trade_offs: Sequence[Mapping[str, float]],
    length: int,
) -> None:
    ids = [token_ids(base.tokenizer, prompt) for prompt in prompts]
    chats = [(prompt, tokens) for prompt, tokens in zip(prompts, ids, strict=True) if not isinstance(prompt, str)]
    alike = sum(server.chat_ids(prompt) == tokens for prompt, tokens in chats)
    print(f"conversations that llama-server renders and reads as the same tokens: {alike} of {len(chats)}\n")
    mixture = ParameterAverage(base.model, adapters, include_base=True)
    alone = greedy(mixture, base.tokenizer, ids, [0.0] * len(adapters), length)
    print("| scales | same tokens | same texts | tokens that the base says too |\n|---|---|---|---|")
    for weights in trade_offs:
        scales = [weights.get(name, 0.0) for name in adapters]
        theirs = [server.greedy(tokens, scales, length) for tokens in ids]
        found = Agreement.of(greedy(mixture, base.tokenizer, ids, scales, length), theirs, alone)
        said = ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items())
        same, base_share = found.same / found.tokens, found.as_base / found.tokens
        print(f"| {said} | {same:.1%} of {found.tokens} | {found.same_texts} of {found.texts} | {base_share:.0%} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
