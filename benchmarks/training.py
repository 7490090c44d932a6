"""What does training a policy by `emorl train` cost beside TRL alone? Seconds and peak memory of the same GRPO training.

Both ways are whole commands, each in a process of its own, in turn (trl, emorl, trl, …): the same base, prompts, reward
function, LoRA, steps, seed and checkpoints (`benchmarks.bare_trl`). A ratio is the median over repeats of the ratio inside one
repeat. *Loop* is the trainer's own `train_runtime`; *command* also has imports, loading and checks. What emorl's validations
took (`eval_runtime` of its log) is taken off both and told apart; of CPU seconds, their share of the wall clock. Both ways must
log the same losses, rewards and gradients and end with the same adapter, or nothing is told.

*emorl* asks torch for huge pages, and so keeps what it frees (`emorl.training.allocator`); *emorl, plain malloc* does neither,
as TRL alone: against it one sees what the allocator gives, against TRL what emorl costs without it.

`--profile` tells instead where the time goes, by part, beside a bound (`benchmarks.training_parts`); its clock may be the
processor's, which others on a machine disturb less.

    export OMP_NUM_THREADS=1
    python -m benchmarks.training --steps 6 --repeats 3
    python -m benchmarks.training --profile --clock cpu --steps 3
    python -m benchmarks.training --base smollm2 --rows 16 --generations 4 --new-tokens 24 --steps 2 --dtype bfloat16
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import yaml
from safetensors.torch import load_file

from benchmarks.bare_trl import LOG
from benchmarks.decode import CLOCKS
from benchmarks.fusion import Run, run
from benchmarks.training_parts import APART, PARTS, Machine, Sizes, Work, bounds
from emorl.config.experiment import load_experiment
from emorl.data import load_prompts
from emorl.policies.base import load_tokenizer
from emorl.policies.prompts import is_chat
from emorl.runs.layout import CHECKPOINTS
from emorl.training.allocator import HUGE_PAGES
from recipes.real_model.prepare import MODELS, models_folder

NAME = "vowels"
VALIDATION, TEST = 32, 2
SAME = ("loss", "reward", "grad_norm", "kl", "completions/mean_length")  # of every step's log
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
TRL = "trl"
WAYS = {
    TRL: ["env", f"{HUGE_PAGES}=0"],
    "emorl": ["env", f"{HUGE_PAGES}=1"],
    "emorl, plain malloc": ["env", f"{HUGE_PAGES}=0"],
}
"""way -> what stands before its command"""


@dataclass(frozen=True)
class Training:
    """What one run of one way took, without validation."""

    command: float
    """seconds"""
    cpu: float
    """seconds of the command on a processor"""
    loop: float
    """seconds"""
    validation: float
    """seconds"""
    peak: int
    """bytes"""


def write_inputs(folder: Path, options: argparse.Namespace) -> tuple[Path, Path]:
    """Files of one training for both ways: (emorl's experiment, settings of the bare script)."""
    base = str(models_folder() / options.base if options.base in MODELS else Path(options.base).resolve())
    rows = [json.loads(line)["prompt"] for line in options.prompts.read_text(encoding="utf-8").splitlines()]
    _write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in rows])
    grpo = {"per_device_train_batch_size": options.rows, "num_generations": options.generations, "learning_rate": 1e-4,
            "beta": 0.05, "max_steps": options.steps}  # fmt: skip
    experiment = {
        "output": str(folder / "emorl"), "seed": options.seed, "base": {"model": base, "dtype": options.dtype},
        "data": {"path": str(folder / "prompts.jsonl"), "validation": options.validation, "test": TEST},
        "objectives": {NAME: f"benchmarks.bare_trl:{NAME}"},
        "generation": {"max_new_tokens": options.new_tokens, "do_sample": False},
        "train": {"lora": LORA, "grpo": {**grpo, "eval_steps": options.eval_steps},
                  "convergence": {"threshold": 0}, "collapse": {"share": 0}},
    }  # fmt: skip
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    loaded = load_experiment(folder / "experiment.yaml")
    splits = load_prompts(loaded.data, options.seed, conversational=is_chat(load_tokenizer(loaded.base)))
    _write_rows(folder / "train.jsonl", list(splits.train))
    settings = {"base": base, "dtype": options.dtype, "prompts": str(folder / "train.jsonl"), "lora": LORA,
                "grpo": {**grpo, "seed": options.seed, "max_completion_length": options.new_tokens},
                "output": str(folder / TRL)}  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder / "experiment.yaml", folder / "settings.json"


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def command_of(way: str, experiment: Path, settings: Path) -> list[str]:
    rest = ["benchmarks.bare_trl", str(settings)] if way == TRL else ["emorl", "train", str(experiment)]
    return [*WAYS[way], sys.executable, "-m", *rest]


def run_way(way: str, command: Sequence[str], folder: Path) -> Training:
    """Trains anew; what it leaves stays in the folder until the next run."""
    shutil.rmtree(output_of(way, folder), ignore_errors=True)
    return training_of(run(*command), read_log(way, folder))


def output_of(way: str, folder: Path) -> Path:
    return folder / (TRL if way == TRL else "emorl")


def training_of(measured: Run, log: Sequence[Mapping[str, Any]]) -> Training:
    """Takes the validations of a log off what a command took."""
    validation = sum(entry.get("eval_runtime", 0.0) for entry in log)
    [loop] = [entry["train_runtime"] for entry in log if "train_runtime" in entry]
    wall, cpu = measured.seconds["wall"], measured.seconds["cpu"]
    return Training(wall - validation, cpu * (1 - validation / wall), loop - validation, validation, measured.peak)


def read_log(way: str, folder: Path) -> list[dict[str, Any]]:
    """The trainer's log."""
    if way == TRL:
        return json.loads((output_of(way, folder) / LOG).read_text())
    return json.loads((output_of(way, folder) / "train" / NAME / "result.json").read_text())["log"]


def check_same(way: str, folder: Path, steps: int) -> None:
    """What a way left behind is what TRL left.

    Raises:
        SystemExit: a logged figure, or an entry of the last adapter, differs by more than 1e-6.
    """
    logs = [[entry for entry in read_log(one, folder) if "loss" in entry] for one in (way, TRL)]
    for ours, theirs in zip(*logs, strict=True):
        for key in SAME:
            if abs(ours[key] - theirs[key]) > 1e-6:
                raise SystemExit(f"step {ours['step']}: {key} is {ours[key]}, {theirs[key]} by TRL: not the same training.")
    saved = Path(f"checkpoint-{steps}", "adapter_model.safetensors")
    ours = load_file(output_of(way, folder) / "train" / NAME / CHECKPOINTS / saved)
    theirs = load_file(output_of(TRL, folder) / saved)
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in ours.keys() | theirs.keys())
    if apart > 1e-6:
        raise SystemExit(f"an entry of the adapter differs by {apart:.1e} from TRL's: not the same training.")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, list[Training]]:
    """Every way as often as asked, in turn."""
    files = write_inputs(folder, options)
    found: dict[str, list[Training]] = {way: [] for way in options.ways}
    for _ in range(options.repeats):
        for way in options.ways:
            found[way].append(run_way(way, command_of(way, *files), folder))
            if way != TRL:
                check_same(way, folder, options.steps)
    return found


def print_ways(found: Mapping[str, Sequence[Training]]) -> None:
    print("medians (lowest–highest)\n")
    print("| way | loop, s | / trl | command, s | / trl | CPU, s | / trl | peak, MB | / trl | validation, s |\n|" + "---|" * 10)
    for way, runs in found.items():
        cells = []
        for what, unit in (("loop", 1.0), ("command", 1.0), ("cpu", 1.0), ("peak", 1e6)):
            values = [getattr(one, what) for one in runs]
            ratios = [value / getattr(other, what) for value, other in zip(values, found[TRL], strict=True)]
            cells += [f"{statistics.median(values) / unit:.1f}", f"{statistics.median(ratios):.3f} ({_span(ratios)})"]
        validation = statistics.median(one.validation for one in runs)
        print(f"| {way} | {' | '.join(cells)} | {validation:.1f} |")


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.3f}–{max(values):.3f}"


def profile(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """What `benchmarks.training_parts` tells of each way."""
    experiment, settings = write_inputs(folder, options)
    told, output = {}, folder / "parts.json"
    for way in options.ways:
        shutil.rmtree(output_of(way, folder), ignore_errors=True)
        what = [TRL, settings] if way == TRL else ["emorl", experiment]
        command = [*WAYS[way], sys.executable, "-m", "benchmarks.training_parts"]
        run(*command, *map(str, what), str(output), options.dtype, options.clock)
        told[way] = json.loads(output.read_text())
    return told


def work_of(told: Mapping[str, Any]) -> Work:
    return Work(**{**told["work"], "sizes": Sizes(**told["work"]["sizes"])})


def print_parts(told: Mapping[str, Mapping[str, Any]]) -> None:
    """The machine is as fast as it was at its best while all this ran."""
    machine = Machine(*(max(one["machine"][what] for one in told.values()) for what in ("bandwidth", "rate")))
    work = work_of(told[TRL])
    bound, steps = bounds(work, machine), len(work.prompts)
    print(
        f"{machine.bandwidth / 1e9:.1f} GB/s, {machine.rate / 1e9:.0f} GFLOP/s; {steps} steps; tokens computed / real "
        f"{work.computed / work.real:.2f}; seconds a step (share), / trl\n\n"
        f"| part | bound | {' | '.join(told)} |\n|" + "---|" * (2 + len(told))
    )
    whole = {way: sum(one["seconds"].get(part, 0.0) for part in PARTS) for way, one in told.items()}
    for part in PARTS:
        taken = {way: one["seconds"].get(part, 0.0) for way, one in told.items()}
        least = f"{bound[part] / steps:.3f} (time / bound {taken[TRL] / bound[part]:.0f})" if part in bound else ""
        cells = [f"{seconds / steps:.3f} ({100 * seconds / whole[way]:.1f} %)" for way, seconds in taken.items()]
        print(f"| {part} | {least} | {' | '.join(cells)} |")
    cells = [f"{seconds / steps:.3f}, {seconds / whole[TRL]:.3f}" for seconds in whole.values()]
    print(f"| all | {sum(bound.values()) / steps:.3f} | {' | '.join(cells)} |")
    for part in APART:
        cells = [f"{one['seconds'].get(part, 0.0):.2f}" for one in told.values()]
        print(f"| apart, in all: {part} | | {' | '.join(cells)} |")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="../shared/models/counsel-3m", help=f"a folder, or one of {', '.join(MODELS)}")
    parser.add_argument("--prompts", type=Path, default=Path("../shared/data/pair_train.jsonl"))
    parser.add_argument("--rows", type=int, default=64, help="completions in a step")
    parser.add_argument("--generations", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--eval-steps", type=int, default=3, help="between two validations, and two checkpoints")
    parser.add_argument("--validation", type=int, default=VALIDATION, help="prompts")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="where the time goes instead")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="of a profile")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="trl, which is the measure, first")
    parser.add_argument("--json", type=Path, help="also write what is measured to this file")
    options = parser.parse_args(arguments)
    print(
        f"{options.base}, {options.dtype}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; ",
        end="",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        if options.profile:
            told = profile(options, Path(folder))
            print_parts(told)
        else:
            found = measure(options, Path(folder))
            print_ways(found)
            told = {way: [vars(one) for one in runs] for way, runs in found.items()}
    if options.json:
        options.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
