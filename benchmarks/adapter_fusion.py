"""How long does it take to fuse three LoRA adapters, and how exact is the result? Ours against PEFT's `add_weighted_adapter`.

Random adapters on all 7 projections of a random Llama, independent of each other: the worst case for PEFT's `linear`, which
mixes A and B matrices. *Error* is the Frobenius norm of (delta of the fused adapter - weighted sum of the deltas in float64)
over that of the sum, over all modules; what the truncation to `--rank` costs at least is in it. Ours reads the adapters from
disk and writes one, without a model; PEFT works inside a loaded model, and neither loading nor saving is in its time. Ways
are interleaved within each repeat; a ratio is the median over repeats of the ratio inside one repeat. PEFT's `svd`
decomposes full deltas and takes minutes: `--peft-svd`.

    python -m benchmarks.adapter_fusion --threads 1
    python -m benchmarks.adapter_fusion --threads 1 --repeats 1 --peft-svd
"""

import argparse
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import decode
from benchmarks.decode import CLOCKS, TARGETS, load_peft
from emorl.fusion.adapters import fuse_adapters
from emorl.fusion.operators import Fusion
from emorl.policies.adapters import Adapter, read_adapter

SIZES = {
    "110m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
             "vocab_size": 16000},
    "tiny": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100},
    **{size: decode.SIZES[size] for size in ("134m", "1b")},
}  # fmt: skip
WEIGHTS = (0.5, 0.3, 0.2)
REFERENCE = "peft cat"

Way = Callable[[], Callable[[str], Tensor]]
"""fuses, and returns the function from a module's name to its fused delta (in, out)"""


def make_model(size: str, rank: int, folder: Path) -> PeftModel:
    """A random Llama with three random adapters, loaded from where they were saved: folder/0, 1, 2."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[size], bos_token_id=None, eos_token_id=None, pad_token_id=0)
    base = LlamaForCausalLM(config).eval()
    adapted = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS))
    paths = [folder / str(index) for index in range(len(WEIGHTS))]
    for path in paths:
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        adapted.save_pretrained(str(path))
    return load_peft(adapted.unload(), paths)


def make_ways(model: PeftModel, folder: Path, rank: int, peft_svd: bool) -> dict[str, Way]:
    sources = [str(index) for index in range(len(WEIGHTS))]
    written = 0

    def ours(**truncation: int) -> Callable[[str], Tensor]:
        nonlocal written
        written += 1
        adapters = [read_adapter(folder / source) for source in sources]
        factors = read_adapter(fuse_adapters(adapters, Fusion("linear", WEIGHTS), folder / f"o{written}", **truncation)).factors
        return lambda name: factors[name][0].double() @ factors[name][1].double()

    def peft(kind: str) -> Callable[[str], Tensor]:
        model.add_weighted_adapter(sources, list(WEIGHTS), kind, combination_type=kind, svd_rank=rank)
        modules = dict(model.get_base_model().named_modules())
        return lambda name: modules[name].get_delta_weight(kind).double().T  # type: ignore[operator]

    ways = {
        "ours, concatenated": ours,
        f"ours, compressed to rank {rank}": lambda: ours(rank=rank),
        "peft linear": lambda: peft("linear"),
        REFERENCE: lambda: peft("cat"),
    }
    return ways | ({"peft svd": lambda: peft("svd")} if peft_svd else {})


def error(found: Callable[[str], Tensor], adapters: Sequence[Adapter]) -> float:
    """Relative to the weighted sum of the adapters' deltas."""
    apart = whole = 0.0
    for name in adapters[0].factors:
        pairs = [adapter.factors[name] for adapter in adapters]
        exact = sum(weight * (a.double() @ b.double()) for weight, (a, b) in zip(WEIGHTS, pairs, strict=True))
        apart += float((found(name) - exact).square().sum())
        whole += float(exact.square().sum())  # type: ignore[union-attr]
    return math.sqrt(apart / whole)


def measure(
    ways: dict[str, Way], model: PeftModel, adapters: Sequence[Adapter], repeats: int, clock: Callable[[], float]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds by way and repeat, and the error by way."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    errors = {}
    for repeat in range(repeats):
        names = list(ways)
        for way in names[repeat % len(names) :] + names[: repeat % len(names)]:
            start = clock()
            found = ways[way]()
            seconds[way].append(clock() - start)
            if repeat == 0:
                errors[way] = error(found, adapters)
            for added in set(model.peft_config) & {"linear", "cat", "svd"}:
                model.delete_adapter(added)
    return seconds, errors


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="110m")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu where other processes disturb")
    parser.add_argument("--peft-svd", action="store_true", help="PEFT's `svd` too: minutes")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, {options.clock} clock, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        model = make_model(options.size, options.rank, folder)
        ways = make_ways(model, folder, options.rank, options.peft_svd)
        adapters = [read_adapter(folder / str(index)) for index in range(len(WEIGHTS))]
        seconds, errors = measure(ways, model, adapters, options.repeats, CLOCKS[options.clock])
    rows = [
        {
            "way": way,
            "seconds": statistics.median(times),
            "ratio": statistics.median(a / b for a, b in zip(times, seconds[REFERENCE], strict=True)),
            "error": errors[way],
        }
        for way, times in seconds.items()
    ]
    print(f"| way | seconds | time / {REFERENCE} | error |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['way']} | {row['seconds']:.2f} | {row['ratio']:.2f} | {row['error']:.1e} |")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
