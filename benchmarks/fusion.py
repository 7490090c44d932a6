"""How long does it take to fuse whole checkpoints, and in how much memory? `emorl fuse` against mergekit on the same file.

The whole command is measured, from its start to the finished folder, imports included, in turn (theirs, ours, theirs, …)
after a run of each that warms the page cache and gives the two results that are compared. Synthetic Llamas: a base, and
three fine-tunes that are the base and noise of 5 percent. *Peak* is the largest resident size of the process. *Bound*:
`import torch`, and what must be read and written at the measured speed of copying a file (into the page cache; ours then
waits for the disk, mergekit does not; *sync* says for how long a copy does). *Differ*: entries further apart than 1e-6
(bfloat16: than a unit in the last place; there mergekit calculates in bfloat16 too), and how many of them lie exactly at
the magnitude at which TIES trims, where one of several equal entries is as good as another.

*In memory* is what a candidate costs inside a search, its models loaded before: all tensors fused into a loaded model, as
`LoadedFusion` does it. mergekit costs a command each.

    python -m benchmarks.fusion
    python -m benchmarks.fusion --dtype bfloat16
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.adapter_fusion import SIZES
from benchmarks.decode import CLOCKS
from emorl.fusion.checkpoints import CheckpointFusion
from emorl.fusion.loaded import LoadedFusion, loaded_models
from emorl.fusion.mergekit_file import mergekit_fusion
from emorl.fusion.methods.ties import trim_threshold
from emorl.fusion.operators import Fusion
from emorl.fusion.tensor_files import WEIGHTS_NAME, ShardWriter, TensorSpec

NAMES = ("base", "one", "two", "three")
NOISE = 0.05  # of the base's standard deviation: far enough apart for SLERP's arc (cosine below 0.9995)
WEIGHTS = {"one": 0.5, "two": 0.3, "three": 0.2}
JOBS: dict[str, dict[str, Any]] = {
    "ties3": {"merge_method": "ties", "base_model": "base", "parameters": {"density": 0.5, "normalize": True}},
    "slerp": {"merge_method": "slerp", "base_model": "one", "parameters": {"t": 0.3}},
    "linear3": {"merge_method": "linear", "parameters": {"normalize": True}},
}
GOALS = {"ties3": 6.0, "slerp": 2.5, "linear3": 2.0}  # times faster than mergekit
UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-7}  # relative; in the last place

_RUN = """
import json, os, sys, time
start = time.perf_counter()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(child, 0)
clocks = {"wall": time.perf_counter() - start, "cpu": usage.ru_utime + usage.ru_stime}
print(json.dumps([clocks, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status)]))
"""


@dataclass(frozen=True)
class Run:
    """One run of a command."""

    seconds: dict[str, float]
    """by clock, wall and cpu"""
    peak: int
    """bytes"""


def run(*command: str) -> Run:
    """Runs it from a small process: a command started by this one would count this one's memory as its own peak.

    Raises:
        SystemExit: the command failed.
    """
    started = [sys.executable, "-S", "-c", _RUN, *command]
    done = subprocess.run(started, capture_output=True, text=True, check=True)
    seconds, peak, code = json.loads(done.stdout)
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}:\n{done.stderr[-2000:]}")
    return Run(seconds, peak)


def make_checkpoints(folder: Path, size: str, dtype: torch.dtype) -> None:
    """folder/base, one, two, three; those that are there already are kept."""
    kind = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, "dtype": str(dtype).removeprefix("torch.")}
    config = LlamaConfig.from_dict({**SIZES[size], **kind})
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    specs = [TensorSpec(name, dtype, shape) for name, shape in shapes.items()]
    for number, name in enumerate(NAMES):
        if (folder / name / "config.json").is_file():
            continue
        (folder / name).mkdir(parents=True, exist_ok=True)
        start, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(number)
        with ShardWriter(folder / name, specs, shard_size=1 << 40) as writer:
            for spec in specs:
                tensor = torch.randn(spec.shape, generator=start) * 0.02
                if number:
                    tensor += torch.randn(spec.shape, generator=noise) * (0.02 * NOISE)
                writer.write(spec.name, (tensor + 1 if "norm" in spec.name else tensor).to(dtype))
        config.save_pretrained(folder / name)


def merge_file(job: str, folder: Path, dtype: str) -> dict[str, Any]:
    """A job as mergekit's YAML."""
    content = {**JOBS[job], "dtype": dtype}
    if "base_model" in content:
        content["base_model"] = str(folder / content["base_model"])
    if job == "slerp":
        models = [{"model": str(folder / name)} for name in ("one", "two")]
    else:
        models = [{"model": str(folder / name), "parameters": {"weight": weight}} for name, weight in WEIGHTS.items()]
    return {**content, "models": models}


def commands(file: Path, output: Path) -> dict[str, list[str]]:
    """mergekit's command and ours, by name; each writes output/NAME."""
    theirs = str(Path(sys.executable).with_name("mergekit-yaml"))
    return {
        "mergekit": [theirs, str(file), str(output / "mergekit"), "--quiet", "--no-copy-tokenizer"],
        "emorl": [sys.executable, "-m", "emorl", "fuse", str(file), "--output", str(output / "emorl")],
    }


def run_fresh(command: Sequence[str], output: Path) -> Run:
    """Runs a command that makes the folder `output` (removed before)."""
    shutil.rmtree(output, ignore_errors=True)
    return run(*command)


@dataclass(frozen=True)
class Difference:
    """Between two results."""

    largest: float
    """of entries that are not at the threshold of a trim"""
    apart: int
    """entries that differ by more than they may"""
    at_threshold: int
    """of these, in TIES: where a task vector has exactly the magnitude at which it is trimmed"""


def compare(ours: Path, theirs: Path, what: CheckpointFusion) -> Difference:
    """The models in two folders, `what` being what was to be done."""
    found, expected = load_file(ours / WEIGHTS_NAME), load_file(theirs / WEIGHTS_NAME)
    assert found.keys() == expected.keys()
    largest, apart, at_threshold = 0.0, 0, 0
    models, base = load_models(what)
    for planned in what.tensors:
        values, reference = found[planned.name], expected[planned.name]
        assert values.dtype == reference.dtype
        distance = (values.float() - reference.float()).abs()
        differing = distance > 1e-6 + UNIT[values.dtype] * reference.float().abs()
        apart += int(differing.sum())
        if planned.fusion.method == "ties" and base is not None:
            shares = planned.fusion.settings["density"]
            trimmed = torch.zeros_like(differing)
            for model, share in zip(models, shares, strict=True):
                threshold = trim_threshold(model[planned.name], base[planned.name], share)
                trimmed |= (model[planned.name].float() - base[planned.name].float()).abs() == threshold
            at_threshold += int((differing & trimmed).sum())
            distance[differing & trimmed] = 0
        largest = max(largest, float(distance.max()))
    return Difference(largest, apart, at_threshold)


def load_models(what: CheckpointFusion) -> tuple[list[dict[str, Tensor]], dict[str, Tensor] | None]:
    """State dicts of the models and of the base."""
    models = [load_file(model.path / WEIGHTS_NAME) for model in what.models]
    return models, None if what.base is None else load_file(what.base.path / WEIGHTS_NAME)


def loaded_fusion(what: CheckpointFusion) -> LoadedFusion:
    """The models of a job in memory, to be fused into a loaded one."""
    models, base = load_models(what)
    dtype = next(iter(models[0].values())).dtype
    return loaded_models(LlamaForCausalLM.from_pretrained(what.models[0].path, dtype=dtype), models, base)


def fuse_in_memory(loaded: LoadedFusion, what: CheckpointFusion, clock: str) -> float:
    """Seconds for one candidate, of which no tensor is there yet."""
    first = Fusion("keep", (1.0,) + (0.0,) * (len(what.models) - 1))
    loaded.apply(lambda name: first)
    fusions = {planned.name: planned.fusion for planned in what.tensors}
    start = CLOCKS[clock]()
    assert loaded.apply(fusions.__getitem__) == len(fusions)
    return CLOCKS[clock]() - start


def copy_speeds(source: Path, target: Path) -> tuple[float, float]:
    """(bytes/s read and written by a copy into the page cache, bytes/s at which these reach the disk); the best of three."""
    copying, syncing = [], []
    size = source.stat().st_size
    for _ in range(3):
        with source.open("rb") as reading, target.open("wb") as writing:
            start = time.perf_counter()
            shutil.copyfileobj(reading, writing, 1 << 20)
            writing.flush()
            copied = time.perf_counter()
            os.fsync(writing.fileno())
            copying.append(copied - start)
            syncing.append(time.perf_counter() - copied)
        target.unlink()
    return 2 * size / min(copying), size / min(syncing)


def measure_job(job: str, folder: Path, dtype: str, pairs: int, clock: str) -> dict[str, Any]:
    """Everything measured of one job."""
    content, output = merge_file(job, folder, dtype), folder / "fused"
    file = folder / f"{job}.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    rivals = commands(file, output)
    output.mkdir(exist_ok=True)
    for name, command in rivals.items():
        run_fresh(command, output / name)
    what = mergekit_fusion(content)
    difference = compare(output / "emorl", output / "mergekit", what)
    loaded = loaded_fusion(what)
    fuse_in_memory(loaded, what, clock)
    runs: dict[str, list[Run]] = {name: [] for name in rivals}
    in_memory = []
    for _ in range(pairs):
        for name, command in rivals.items():
            runs[name].append(run_fresh(command, output / name))
        in_memory.append(fuse_in_memory(loaded, what, clock))
    moved = sum((one.path / WEIGHTS_NAME).stat().st_size for one in [*what.models, *([what.base] if what.base else [])])
    moved += (output / "emorl" / WEIGHTS_NAME).stat().st_size
    shutil.rmtree(output)
    return {
        "job": job,
        "seconds": {name: [one.seconds[clock] for one in found] for name, found in runs.items()},
        "peak": {name: max(one.peak for one in found) for name, found in runs.items()},
        "in_memory": in_memory,
        "bytes": moved,
        "difference": vars(difference),
    }


def ratios(row: dict[str, Any], rival: Sequence[float]) -> list[float]:
    """mergekit's seconds / those of `rival`, pair by pair."""
    return [theirs / other for theirs, other in zip(row["seconds"]["mergekit"], rival, strict=True)]


def print_rows(rows: Sequence[dict[str, Any]], importing: float, speeds: tuple[float, float]) -> None:
    def several(values: Sequence[float], digits: int = 1) -> str:
        return " / ".join(f"{value:.{digits}f}" for value in values)

    print(
        "| job | mergekit, s | emorl, s | ratio per pair | median (goal) | peak, MB: mergekit, emorl | share "
        "| differ (at threshold) | largest else | bound, s | emorl / bound |\n|" + "---|" * 11
    )
    for row in rows:
        ours, faster = row["seconds"]["emorl"], ratios(row, row["seconds"]["emorl"])
        peaks, difference = row["peak"], row["difference"]
        bound = importing + row["bytes"] / speeds[0]
        print(
            f"| {row['job']} | {several(row['seconds']['mergekit'])} | {several(ours)} | {several(faster)} "
            f"| {statistics.median(faster):.1f} ({GOALS[row['job']]:g}) | {peaks['mergekit'] / 1e6:.0f}, "
            f"{peaks['emorl'] / 1e6:.0f} | {peaks['emorl'] / peaks['mergekit']:.2f} | {difference['apart']} "
            f"({difference['at_threshold']}) | {difference['largest']:.1e} | {bound:.1f} "
            f"| {statistics.median(ours) / bound:.1f} |"
        )
    print("\n| job | in memory, s | mergekit's command / this, per pair | median (goal) |\n|---|---|---|---|")
    for row in rows:
        faster = ratios(row, row["in_memory"])
        print(f"| {row['job']} | {several(row['in_memory'], 2)} | {several(faster)} | {statistics.median(faster):.1f} (20) |")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="110m")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu (of all threads) where others disturb")
    parser.add_argument("--folder", type=Path, help="of the checkpoints, kept (without it: a temporary one)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve() / f"{options.size}-{options.dtype}"
        make_checkpoints(folder, options.size, getattr(torch, options.dtype))
        weights = folder / "base" / WEIGHTS_NAME
        speeds = copy_speeds(weights, folder / "copy")
        importing = min(run(sys.executable, "-c", "import torch").seconds[options.clock] for _ in range(options.pairs))
        print(
            f"{options.size}, {options.dtype}, {torch.get_num_threads()} threads, {options.clock} clock, load "
            f"{os.getloadavg()[0]:.1f}, torch {torch.__version__}; import torch {importing:.1f} s; copying "
            f"{speeds[0] / 1e9:.2f} GB/s read and written; sync {weights.stat().st_size / speeds[1]:.1f} s per model\n",
            flush=True,
        )
        rows = [measure_job(job, folder, options.dtype, options.pairs, options.clock) for job in options.jobs]
    print_rows(rows, importing, speeds)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
