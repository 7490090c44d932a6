"""The parts of the device check, each a command of its own: rows are written as they come, so that a part that is stopped
keeps what it has. `benchmarks/gpu/check.py` runs them all; random models, so nothing is needed but the repository.

    python -m benchmarks.gpu.parts trie --size 134m --json rows.json
    python -m benchmarks.gpu.parts decode --size tiny --json rows.json --device cpu
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks import decode, fusion
from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.aggregation.trie import TrieDecoder
from emorl.dynamic.agents.observation import FixedWeights
from emorl.dynamic.engines.engine import Decoding
from emorl.dynamic.engines.union import UnionEngine
from emorl.dynamic.rollout import write
from emorl.fusion.mergekit_file import mergekit_fusion
from emorl.policies.adapters import read_adapter

ROOT = Path(__file__).parents[2]
REPEATS = 3
PROMPT_TOKENS, NEW_TOKENS = 32, 16
EXPERIMENT = {
    "objectives": {"vowels": "benchmarks.gpu.parts:vowels", "spaces": "benchmarks.gpu.parts:spaces"},
    "generation": {"max_new_tokens": NEW_TOKENS, "do_sample": False},
    "train": {
        "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "grpo": {"max_steps": 5, "eval_steps": 5, "per_device_train_batch_size": 32, "num_generations": 8},
        "collapse": {"share": 0.0},
    },
}


@dataclass(frozen=True)
class Row:
    """One figure, and what it is set against."""

    part: str
    model: str
    what: str
    figure: str
    ratio: float | None = None
    to: str = ""
    """of what the ratio is: this time / that time"""
    bound: float | None = None
    """time / the time in which memory can be read, or files copied"""


@dataclass(frozen=True)
class Case:
    """What a part is run on."""

    size: str
    device: str
    folder: Path
    """an empty one of its own"""

    def seconds(self, work: Callable[[], object]) -> float:
        """Median of several, after one that warms up."""
        found = []
        for repeat in range(REPEATS + 1):
            start = time.perf_counter()
            work()
            if self.device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                found.append(time.perf_counter() - start)
        return statistics.median(found)


def machine(case: Case) -> Iterator[Row]:
    """The card, the libraries, and what memory and multiplication give at best."""
    card = torch.cuda.get_device_name() if case.device == "cuda" else "no GPU: CPU"
    yield Row("machine", "", card, f"torch {torch.__version__}, transformers {transformers.__version__}")
    moved, multiplied = decode.measure_machine(torch.bfloat16, case.device)
    yield Row("machine", "", "memory moved; products in bfloat16", f"{moved / 1e9:.0f} GB/s; {multiplied / 1e12:.1f} TFLOP/s")


def tests(case: Case) -> Iterator[Row]:
    """The suite's tests marked `gpu`; of a CPU, the same files' other tests."""
    mark = "gpu" if case.device == "cuda" else "not gpu and not slow"
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    files = files if case.device == "cuda" else [path for path in files if path.endswith("test_cuda.py")]
    options = ["-n", "0", "-q", "-p", "no:cacheprovider", "-m", mark, "-o", "filterwarnings=default"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files], cwd=ROOT, capture_output=True, text=True, check=False
    )
    print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    if done.returncode:
        raise SystemExit(f"pytest ended with {done.returncode}")
    yield Row("tests", "", f"{len(files)} files with tests marked gpu", done.stdout.strip().splitlines()[-1].strip("= "))


def train(case: Case) -> Iterator[Row]:
    """Two policies, five steps each, in bfloat16, by the command a user types."""
    base, _ = decode.make_policies(case.size, 1, 1, case.folder, dtype=torch.bfloat16, device=case.device)
    base.save_pretrained(case.folder / "base")
    bytewise(min(4000, base.config.vocab_size)).save_pretrained(case.folder / "base")
    prompts = "".join(json.dumps({"prompt": f"Tell me about the number {i}, and why."}) + "\n" for i in range(64))
    (case.folder / "prompts.jsonl").write_text(prompts)
    content = {
        "output": str(case.folder / "run"),
        "base": {"model": str(case.folder / "base"), "dtype": "bfloat16"},
        "data": {"path": str(case.folder / "prompts.jsonl"), "validation": 8, "test": 8},
        **EXPERIMENT,
    }
    (case.folder / "experiment.yaml").write_text(yaml.safe_dump(content))
    for name in content["objectives"]:
        command = [sys.executable, "-m", "emorl", "train", str(case.folder / "experiment.yaml"), "--objective", name]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"emorl train ended with {done.returncode}: {done.stderr[-1500:]}")
        seconds, folder = time.perf_counter() - start, case.folder / "run" / "train" / name
        log = json.loads((folder / "result.json").read_text())["log"]
        steps = [entry["step_time"] for entry in log if "step_time" in entry]
        adapter = load_file(folder / "policy" / "adapter_model.safetensors")
        moved = sum(float(tensor.float().norm()) for key, tensor in adapter.items() if "lora_B" in key)
        assert moved > 0, "the adapter did not move"
        assert all(torch.isfinite(tensor).all() for tensor in adapter.values()), "the adapter is not finite"
        figure = f"{statistics.median(steps):.2f} s a step, {seconds:.0f} s with imports and validation"
        yield Row("train", case.size, f"policy {name}: {len(steps)} steps of 32 completions, bfloat16", figure)


def decoding(case: Case) -> Iterator[Row]:
    """`benchmarks/decode.py`: K = 1 and 3 against PEFT's one policy; its rivals too on the small model."""
    for batch in (1, 8, 64):
        file = case.folder / f"{batch}.json"
        options = {
            "--sizes": case.size, "--batch": batch, "--prompt-tokens": PROMPT_TOKENS, "--new-tokens": NEW_TOKENS,
            "--repeats": REPEATS, "--dtype": "bfloat16", "--device": case.device, "--json": file,
            "--rivals": "none" if case.size == "1b" else "all",
        }  # fmt: skip
        arguments = [str(part) for pair in options.items() for part in pair]
        decode.main([*arguments, "--threads", str(torch.get_num_threads()), "--policies", "1", "3"])
        for row in json.loads(file.read_text()):
            figure = f"{row['tokens_per_second']:.0f} tokens/s"
            what = f"batch {batch}: {row['method']}"
            yield Row("decode", case.size, what, figure, row["time_to_single"], decode.SINGLE, row["time_to_bound"])


def trie(case: Case) -> Iterator[Row]:
    """Twelve candidates as one trie against one `generate()` each; equal texts in float32, nearly all in bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        base, paths = decode.make_policies(case.size, 16, 3, case.folder, dtype=dtype, device=case.device)
        ensemble: Any = HiddenStateEnsemble(base, {path.name: read_adapter(path) for path in paths})
        prompts = torch.randint(1, base.config.vocab_size, (8, PROMPT_TOKENS), device=case.device)
        inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts)}
        weights = torch.rand(12, 3, generator=torch.Generator().manual_seed(0))
        weights[:8] = weights[0] + 0.02 * weights[:8]
        found = {}

        def as_trie(inputs: Any = inputs, weights: Any = weights, ensemble: Any = ensemble, found: Any = found) -> None:
            found["trie"] = TrieDecoder(ensemble, **inputs, max_new_tokens=NEW_TOKENS).decode(weights).cpu()

        def each(inputs: Any = inputs, weights: Any = weights, ensemble: Any = ensemble, found: Any = found) -> None:
            rows = [ensemble.generate(**inputs, weights=row, max_new_tokens=NEW_TOKENS, do_sample=False) for row in weights]
            found["each"] = torch.stack(rows)[:, :, PROMPT_TOKENS:].cpu()

        seconds, alone = case.seconds(as_trie), case.seconds(each)
        equal = float((found["trie"] == found["each"]).all(-1).float().mean())
        name = str(dtype).removeprefix("torch.")
        figure = f"{seconds:.2f} s, {equal:.0%} of texts equal"
        yield Row("trie", case.size, f"12 candidates, 8 prompts, {name}", figure, seconds / alone, "generate() each")
        del base, ensemble


@torch.no_grad()
def union(case: Case) -> Iterator[Row]:
    """Two models with a tokenizer each against both one after the other; bound: the bytes of both at each token."""
    pair, sizes = [], (2000, 4000)
    for index, size in enumerate(sizes):
        base, _ = decode.make_policies(case.size, 1, 1, case.folder / str(index), dtype=torch.bfloat16, device=case.device)
        pair.append((base, bytewise(min(size, base.config.vocab_size))))
    names = ["one", "two"]
    engine = UnionEngine([base for base, _ in pair], [tokenizer for _, tokenizer in pair], names)
    prompts = [f"Tell me about the number {i}, and why." for i in range(8)]
    rates = {}

    def together() -> None:
        start = time.perf_counter()
        rollout = write(engine, prompts, FixedWeights(torch.tensor([0.5, 0.5])), Decoding(NEW_TOKENS), span="turn")
        rates["seconds a token"] = (time.perf_counter() - start) / max(answer.tokens for answer in rollout.answers)

    def in_turn() -> None:
        start = time.perf_counter()
        for base, tokenizer in pair:
            inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(case.device)
            base.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False).cpu()
        rates["in turn"] = (time.perf_counter() - start) / NEW_TOKENS

    case.seconds(together)
    case.seconds(in_turn)
    moved, _ = decode.measure_machine(torch.bfloat16, case.device)
    bound = sum(parameter.nbytes for base, _ in pair for parameter in base.parameters()) / moved
    seconds = rates["seconds a token"]
    figure = f"{1e3 * seconds:.1f} ms a token of 8 texts"
    yield Row(
        "union", case.size, "two models, top 10", figure, seconds / rates["in turn"], "generate() in turn", seconds / bound
    )


def fuse(case: Case) -> Iterator[Row]:
    """`emorl fuse` on whole checkpoints, and in memory into a model on the device."""
    fusion.make_checkpoints(case.folder, case.size, torch.bfloat16)
    speeds = fusion.copy_speeds(case.folder / "base" / fusion.WEIGHTS_NAME, case.folder / "copy")
    for job in ("linear3", "ties3"):
        content = fusion.merge_file(job, case.folder, "bfloat16")
        file = case.folder / f"{job}.yaml"
        file.write_text(yaml.safe_dump(content))
        command = fusion.commands(file, case.folder)["emorl"]
        taken = fusion.run_fresh(command, case.folder / "emorl")
        what = mergekit_fusion(content)
        read = [model.path for model in what.models] + ([what.base.path] if what.base else [])
        moved = sum((path / fusion.WEIGHTS_NAME).stat().st_size for path in [*read, read[0]])
        figure = f"{taken.seconds['wall']:.1f} s, {taken.peak / 1e6:.0f} MB"
        yield Row("fuse", case.size, f"{job}, command", figure, bound=taken.seconds["wall"] / (moved / speeds[0]))
        loaded = fusion.loaded_fusion(what)
        loaded.model.to(case.device)
        fusion.fuse_in_memory(loaded, what, "wall")
        inside = fusion.fuse_in_memory(loaded, what, "wall")
        yield Row("fuse", case.size, f"{job}, in memory", f"{inside:.2f} s", inside / taken.seconds["wall"], "command")


def vowels(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Vowels, twenty of them at best: a random model's completions differ in it."""
    return [min(1.0, sum(text.count(letter) for letter in "aeiou") / 20) for text in completions]


def spaces(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Spaces, ten of them at best."""
    return [min(1.0, text.count(" ") / 10) for text in completions]


def bytewise(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on this repository's documents."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "<end>"]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train([str(path) for path in sorted((ROOT / "docs").glob("*.md"))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", padding_side="left")


PARTS: dict[str, Callable[[Case], Iterator[Row]]] = {
    "machine": machine, "tests": tests, "train": train, "decode": decoding, "trie": trie, "union": union, "fuse": fuse
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--size", choices=list(decode.SIZES), default="134m", help="134m is SmolLM2's shape (%(default)s)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, required=True, help="file of the rows")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in PARTS[options.part](Case(options.size, options.device, Path(folder))):
            rows.append(asdict(row))
            options.json.write_text(json.dumps(rows, indent=2) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
