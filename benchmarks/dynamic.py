"""What does an agent cost? Decoding with weights chosen anew for every span, against the same decoding with fixed weights.

Three random LoRA policies on a random Llama, no end token, so that all write equally many tokens. *fixed* is the dynamic
ensemble's own loop with one weight vector and no agent; `generate()` is transformers' loop on the same ensemble. Agents
are as they come, untrained: what an action is does not change its cost, but that a model without weight is not run, so no
weight is cut (`least_weight` 0). Ways are interleaved within each repeat; an overhead is the median over repeats of the ratio
inside one repeat, less 1. *choosing* is the share of the time spent in the agent, *signals* the rest of the overhead:
K products with the head, and entropies.

    python -m benchmarks.dynamic --threads 1 --batch 1 8
    python -m benchmarks.dynamic --threads 1 --batch 8 --size tiny --encoder MODEL
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.adapter_fusion import SIZES, make_model
from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.config.dynamic import AgentConfig
from emorl.dynamic.agents.agent import SpanAgent
from emorl.dynamic.agents.observation import FixedWeights
from emorl.dynamic.engines.engine import Decoding
from emorl.dynamic.engines.stacked import StackedEngine
from emorl.dynamic.rollout import write
from emorl.policies.adapters import read_adapter

PROMPT_TOKENS = 32


def make_engine(size: str, folder: Path) -> StackedEngine:
    """Three policies, and a tokenizer whose words are numbers."""
    adapted = make_model(size, 16, folder)
    base: Any = adapted.unload()
    adapters = {str(index): read_adapter(folder / str(index)) for index in range(3)}
    words = {f"w{index}": index for index in range(SIZES[size]["vocab_size"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", padding_side="left")
    return StackedEngine(HiddenStateEnsemble(base, adapters), tokenizer)


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def measure(
    engine: StackedEngine, batch: int, tokens: int, spans: Sequence[int], encoder: str | None, repeats: int
) -> list[dict]:
    """One row per way."""
    generator = torch.Generator().manual_seed(0)
    size = len(engine.tokenizer)
    prompts = [
        " ".join(f"w{index}" for index in torch.randint(size, (PROMPT_TOKENS,), generator=generator).tolist())
        for _ in range(batch)
    ]
    fixed = FixedWeights(torch.full((3,), 1 / 3))
    agents = {
        "signals": SpanAgent("ppo", 3, engine.state_width, AgentConfig(states=False, least_weight=0)),
        "signals and states": SpanAgent("ppo", 3, engine.state_width, AgentConfig(least_weight=0)),
        "MAPPO": SpanAgent("mappo", 3, engine.state_width, AgentConfig(least_weight=0)),
    }
    if encoder is not None:
        agents["encoder"] = SpanAgent("ppo", 3, engine.state_width, AgentConfig(encoder=encoder, least_weight=0))
    inputs = engine.tokenizer(prompts, return_tensors="pt")
    weights = torch.full((batch, 3), 1 / 3)
    generate: Any = engine.ensemble.generate
    ways: dict[str, Callable[[], Any]] = {
        "fixed": lambda: write(engine, prompts, fixed, Decoding(tokens), span="turn"),
        "generate()": lambda: generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            weights=weights,
            max_new_tokens=tokens,
            do_sample=False,
        ),
    }
    for name, agent in agents.items():
        for span in spans:
            ways[f"{name}, span {span}"] = lambda agent=agent, span=span: write(
                engine, prompts, agent, Decoding(tokens), span=span
            )
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    shares: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        base = 0.0
        for name, way in ways.items():
            seconds, found = seconds_of(way)
            base = seconds if name == "fixed" else base
            if repeat:  # the first one warms up
                ratios[name].append(seconds / base)
                shares[name].append(getattr(found, "choosing_seconds", 0.0) / seconds)
    return [
        {"batch": batch, "way": name, "overhead": statistics.median(found) - 1, "choosing": statistics.median(shares[name])}
        for name, found in ratios.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="110m", help="(%(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each text (%(default)s)")
    parser.add_argument("--spans", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="(%(default)s)")
    parser.add_argument("--encoder", help="hub id or folder of an encoder, for one more agent")
    parser.add_argument("--repeats", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        engine = make_engine(options.size, Path(folder))
        rows = [
            row
            for batch in options.batch
            for row in measure(engine, batch, options.tokens, options.spans, options.encoder, options.repeats)
        ]
    if options.json:
        print("\n".join(json.dumps(row) for row in rows))
        return
    print("| batch | way | overhead | choosing |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['batch']} | {row['way']} | {row['overhead']:+.1%} | {row['choosing']:.1%} |")


if __name__ == "__main__":
    main()
