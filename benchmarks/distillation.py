"""How much of the ensemble does one adapter keep, and what does it cost? With multi-teacher distillation as its rival.

For every run: `emorl distill` as its block `distill` says, at fixed weights; then the *routed* student, which is trained
alike but for its teacher: each answer has one policy as its teacher, drawn with the probability that the weights give it
(MOPD, arXiv 2606.30406, where prompts do not say whose they are). Both begin as the same soup, and take as many steps of as
many answers. Compared are all on the test prompts: the value (mean of the objectives), KL from the ensemble in nats per token
of its answers, and the share of the ensemble's gain over the soup that is kept, with 95 % intervals of resampled prompts.
*time* is the median over repeats of the seconds of greedy decoding, divided by those of one policy as PEFT runs it.

    python -m benchmarks.distillation RUN… [--set KEY=VALUE …] [--json FILE]

What it trains lies in RUN/distilled; what is finished is read.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
from peft import PeftModel

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.config import UserError
from emorl.config.experiment import Experiment, load_experiment
from emorl.evaluation.retention import DISTILLED, ENSEMBLE, SOUP
from emorl.policies.adapters import read_adapter
from emorl.policies.prompts import encode
from emorl.runs.console import Console
from emorl.runs.layout import CHECKPOINTS, EXPERIMENT, POLICY, Layout
from emorl.runs.results import DistillationResult, Retention, TradeOff
from emorl.runs.run import open_run, read_cost
from emorl.stages.materials import Materials
from emorl.stages.stage import perform
from emorl.training.distillation import Lesson, distill, distillation_config
from emorl.training.lora import lora_config
from emorl.training.questions import Questions, repeated
from emorl.training.retained import Compared, retentions, summarized
from emorl.training.trainers import prompts_per_step

ROUTED = "routed"
_SYSTEMS = (ENSEMBLE, SOUP, DISTILLED, ROUTED)


def routed_student(materials: Materials, one: TradeOff, output: Path) -> Path:
    """The adapter that learns from one policy an answer; one that is there already stays."""
    experiment, splits = materials.experiment, materials.splits
    run = open_run(output, "distill", {"trainer": experiment.distill.trainer, "weights": one.weights, "seed": experiment.seed})
    if run.finished:
        return output / POLICY
    config = distillation_config(
        experiment.distill.trainer, experiment.base, experiment.generation, experiment.seed, output / CHECKPOINTS
    )
    prompts = repeated(list(splits.train["prompt"]), config.max_steps * prompts_per_step(config), experiment.seed)
    names, validation = experiment.policy_names, list(splits.validation["prompt"])
    shares = np.array([one.weights[name] for name in names])
    drawn = np.random.default_rng(experiment.seed).choice(len(names), size=len(prompts), p=shares / shares.sum())
    training = Questions(prompts, torch.eye(len(names))[drawn.tolist()], prompts)
    ours = Questions(validation, torch.tensor([shares.tolist()]).expand(len(validation), -1), validation)
    lora = lora_config(experiment.train, experiment.base)
    assert lora is not None, "an ensemble is made of adapters"
    lesson = Lesson(materials.base, materials.policies, training, ours, shares.tolist())
    distill(lesson, lora, config, experiment.generation, run, Console(), {"objective": "all", "method": "routed distillation"})
    replace(run, cost=read_cost(output)).finish()
    return output / POLICY


def compare(experiment: Experiment, repeats: int) -> dict[str, Any]:
    """What all systems do on the test prompts, and what they cost."""
    if experiment.distill.front or experiment.ensemble.include_base:
        raise UserError("this compares one adapter for fixed weights of the policies; leave front and include_base out")
    materials = Materials(experiment)
    result: DistillationResult = perform("distill", experiment, Console(), materials)
    [one] = result.trade_offs
    folders = {DISTILLED: Layout(experiment.output).distillation, ROUTED: experiment.output / "distill-routed"}
    routed_student(materials, one, folders[ROUTED])
    tables, students = {}, {}
    for name, folder in folders.items():
        students[name] = HiddenStateEnsemble(materials.base.model, {name: read_adapter(folder / POLICY)}, [1.0])
        models = (materials.mixture("hidden_states"), materials.mixture("parameters"), students[name])
        tables[name] = Compared(*models, materials.tokenizer).tables(  # type: ignore[arg-type]
            one.weights, materials.splits.test, materials.objectives, experiment.generation,
            samples=experiment.evaluate.samples, batch=experiment.evaluate.batch, seed=experiment.seed,
        )  # fmt: skip
    importance = dict.fromkeys(experiment.objectives, 1 / len(experiment.objectives))
    found = {name: summarized(one, of, importance) for name, of in tables.items()}
    kept = {name: retentions(of, importance, experiment.seed) for name, of in tables.items()}
    costs = {name: read_cost(folder) for name, folder in folders.items()}
    return {
        "seed": experiment.seed,
        "rows": [_row(name, found, kept, costs) for name in _SYSTEMS],
        "gain": {what: _shown(kept[DISTILLED][what]) for what in ("divergence", "value")},
        "time": decode_times(materials, one, folders[DISTILLED] / POLICY, repeats),
    }


def _row(name: str, found: Mapping[str, TradeOff], kept: Mapping[str, Any], costs: Mapping[str, Any]) -> dict[str, Any]:
    of, key = found.get(name, found[DISTILLED]), DISTILLED if name in costs else name
    row = {"system": name, "value": of.value[key], "KL": of.divergence[key], **of.scores[key]}
    if name not in costs:
        return row
    shares = {f"kept {what}": _shown(kept[name][what]) for what in ("divergence", "value")}
    return {**row, **shares, "answers": costs[name].completions, "seconds": costs[name].seconds}


def _shown(one: Retention) -> dict[str, float | None]:
    return {"gain": one.gain, "low": one.gain_low, "high": one.gain_high, "share": one.share, "from": one.low, "to": one.high}


@torch.no_grad()
def decode_times(materials: Materials, one: TradeOff, policy: Path, repeats: int) -> dict[str, float]:
    """Seconds of decoding the test prompts in one batch, over those of one policy under PEFT."""
    experiment = materials.experiment
    first = materials.layout.trained(experiment.policy_names[:1])[experiment.policy_names[0]]
    inputs = encode(materials.tokenizer, list(materials.splits.test["prompt"])[:16]).to(materials.base.model.device)
    length = experiment.generation.get("max_new_tokens", 64)
    options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
    alone, distilled = (PeftModel.from_pretrained(deepcopy(materials.base.model), str(p)).eval() for p in (first, policy))
    ensemble = materials.mixture("hidden_states")
    ways: dict[str, Callable[[], Any]] = {
        "one policy": lambda: alone.generate(**inputs, **options),
        DISTILLED: lambda: distilled.generate(**inputs, **options),
        ENSEMBLE: lambda: ensemble.generate(**inputs, **options, weights=one.weights),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):  # the first one warms up
        for name, decode in ways.items():
            start = time.perf_counter()
            decode()
            seconds[name].append(time.perf_counter() - start)
    by_repeat = {name: [t / s for t, s in zip(of[1:], seconds["one policy"][1:], strict=True)] for name, of in seconds.items()}
    return {name: statistics.median(ratios) for name, ratios in by_repeat.items()}


def show(found: Sequence[Mapping[str, Any]]) -> None:
    """One row for each system and run."""
    print("| seed | system | value | KL | KL kept | value kept | answers | seconds | time |\n|" + "---|" * 9)
    for one in found:
        for row in one["rows"]:
            shares = [_percent(row.get(f"kept {what}")) for what in ("divergence", "value")]
            cost = [f"{row['answers']:,}", f"{row['seconds']:.0f}"] if "answers" in row else ["", ""]
            times = f"{one['time'][row['system']]:.2f}" if row["system"] in one["time"] else ""
            print(f"| {one['seed']} | {row['system']} | {row['value']:.3f} | {row['KL']:.4f} | "
                  f"{' | '.join([*shares, *cost, times])} |")  # fmt: skip
        for what, gain in one["gain"].items():
            print(
                f"gain of the ensemble over its soup in {what}: {gain['gain']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f})"
            )


def _percent(share: Mapping[str, Any] | None) -> str:
    if share is None:
        return ""
    return "–" if share["share"] is None else f"{share['share']:.0%} ({share['from']:.0%} to {share['to']:.0%})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output of an experiment whose policies are trained")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings that replace the experiment's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="of decoding (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    found = []
    for run in options.runs:
        settings = [f"output={run / 'distilled'}", f"policies={run}", *options.set]
        found.append(compare(load_experiment(run / EXPERIMENT, settings), options.repeats))
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
