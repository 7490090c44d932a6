"""The specialists made into one policy: a routed teacher, each prompt one specialist, distilled into one adapter.

Each prompt asks for one operation, three times, so the right specialist is known. This is the setting of multi-teacher
distillation (MOPD, arXiv 2606.30406), and the routed teacher its oracle: the share of the routed teacher's gain over the soup
that the student keeps is what Open-MOPD (arXiv 2608.19098) reports as 35.6 %. The weighted ensemble at equal weights stands
beside it: where prompts belong to domains, no fixed mixture is right.

    python -m recipes.rlae.distill --seeds 0 1 2
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig

from emorl.aggregation.ensemble import HiddenStateEnsemble, ParameterAverage
from emorl.config.base import BaseConfig
from emorl.evaluation.retention import DISTILLED, ENSEMBLE, SOUP, kept_value
from emorl.evaluation.scoring import generate
from emorl.policies.adapters import Adapter, read_adapter
from emorl.policies.base import Base, load_base
from emorl.runs.console import Console
from emorl.runs.run import open_run, read_cost
from emorl.training.distillation import Lesson, distill, distillation_config
from emorl.training.questions import Questions
from emorl.training.trainers import prompts_per_step
from recipes.rlae.specialists import OPERATIONS, make, problem

GENERATION = {"max_new_tokens": 15, "do_sample": False}
VALIDATION, TEST = 60, 300
Problem = tuple[str, str, str]
"""prompt, answer, and the operation that it asks for"""


def problems(count: int, seed: int) -> list[Problem]:
    """Prompts of one operation each, in turn."""
    generator, names = np.random.default_rng(seed), list(OPERATIONS)
    numbers: Any = generator.integers(1000, size=(count, 3)).tolist()
    return [(*problem([names[index % 3]] * 3, asked), names[index % 3]) for index, asked in enumerate(numbers)]


def routed(asked: Sequence[Problem]) -> Questions:
    """Each prompt with all weight on its own specialist."""
    prompts = [prompt for prompt, _, _ in asked]
    weights = [[float(name == operation) for name in OPERATIONS] for _, _, operation in asked]
    return Questions(prompts, torch.tensor(weights), prompts)


def distilled(
    base: Base, policies: Mapping[str, Adapter], output: Path, seed: int, rank: int, block: Mapping[str, Any]
) -> Path:
    """The student's adapter; one that is there already stays."""
    run, folder = open_run(output, "distill", {"seed": seed, "rank": rank, **block}), output / "policy"
    if run.finished:
        return folder
    config = distillation_config(block, BaseConfig(model=base.model.name_or_path), GENERATION, seed, output / "checkpoints")
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    training = routed(problems(config.max_steps * prompts_per_step(config), 1000 * seed + 10))
    lesson = Lesson(base, policies, training, routed(problems(VALIDATION, 1000 * seed + 11)), [1 / 3] * 3)
    distill(lesson, lora, config, GENERATION, run, Console(), {"objective": "all", "method": "distillation"})
    replace(run, cost=read_cost(output)).finish()
    return folder


def right_parts(model: Any, base: Base, asked: Sequence[Problem], weights: Any = None) -> np.ndarray:
    """Share of right parts of every prompt (P, 1)."""
    prompts = [prompt for prompt, _, _ in asked]
    rows = None if weights is None else {"weights": torch.as_tensor(weights, dtype=torch.float32).expand(len(asked), -1)}
    table = generate(model, base.tokenizer, prompts, GENERATION, per_prompt=rows)
    pairs = zip(table["completion"], (answer for _, answer, _ in asked), strict=True)
    return np.array([[np.mean(_are_right(said, answer))] for said, answer in pairs])


def _are_right(said: str, answer: str) -> list[bool]:
    parts = [*said.split(";"), "", "", ""]
    return [part == parts[place] for place, part in enumerate(answer.split(";"))]


def measured(root: Path, seed: int, rank: int, block: Mapping[str, Any]) -> dict[str, Any]:
    """Share of right parts by system, and what the student keeps of the routed teacher's gain over the soup."""
    base = load_base(BaseConfig(model=str(root / "specialists" / "base")))
    policies = {name: read_adapter(root / "specialists" / name) for name in OPERATIONS}
    output = root / f"distill-{seed}-{rank}"
    student = {"student": read_adapter(distilled(base, policies, output, seed, rank, block))}
    ensemble, soup = HiddenStateEnsemble(base.model, policies), ParameterAverage(base.model, policies)
    asked = problems(TEST, 1000 * seed + 12)
    scores = {
        ENSEMBLE: right_parts(ensemble, base, asked, routed(asked).weights),
        SOUP: right_parts(soup, base, asked, [1 / 3] * 3),
        DISTILLED: right_parts(HiddenStateEnsemble(base.model, student), base, asked),
    }
    mixed = right_parts(ensemble, base, asked, [1 / 3] * 3)
    kept, cost = kept_value(scores, [1.0], 2000, seed), read_cost(output)
    means = {"routed teacher": ENSEMBLE, "soup": SOUP, "student": DISTILLED}
    found = {name: float(scores[key].mean()) for name, key in means.items()}
    share = {"kept": kept.share, "low": kept.low, "high": kept.high}
    return {"seed": seed, "rank": rank, **found, "ensemble, equal weights": float(mixed.mean()), **share,
            "answers": cost.completions, "seconds": cost.seconds}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the student (%(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 24], help="of the student's adapter (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/rlae"), help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of the distillation (%(default)s)")
    parser.add_argument("--specialist-steps", type=int, default=300, help="of those that are not there yet (%(default)s)")
    options = parser.parse_args(arguments)
    make(options.output / "specialists", options.specialist_steps, options.specialist_steps)
    block = {"max_steps": options.steps, "eval_steps": max(1, options.steps // 6), "per_device_train_batch_size": 48,
             "learning_rate": 3e-3, "lr_scheduler_type": "cosine"}  # fmt: skip
    for seed in options.seeds:
        for rank in options.ranks:
            print(json.dumps(measured(options.output, seed, rank, block)), flush=True)


if __name__ == "__main__":
    main()
