"""The embedded default experiment: three conflicting objectives on the quickstart's parts (`emorl quickstart`)."""

import os
import time
from dataclasses import asdict
from pathlib import Path

from emorl.config.experiment import (
    BaseConfig,
    DataConfig,
    Experiment,
    ObjectiveConfig,
    SearchConfig,
    TrainConfig,
    ValueConfig,
)
from emorl.config.train import ConvergenceConfig
from emorl.quickstart.build import QuickstartParts, build
from emorl.runs.layout import COST
from emorl.runs.progress import Progress
from emorl.runs.run import Cost, write_json


def quickstart_parts(seed: int, progress: Progress) -> QuickstartParts:
    """The example's models and prompts, built if they are not in the cache yet (`EMORL_CACHE`, by default ~/.cache/emorl)."""
    cache = Path(os.environ.get("EMORL_CACHE", "~/.cache/emorl")).expanduser() / "quickstart"
    progress.say(f"parts: a tiny chat policy and three reward models, made from a synthetic corpus, in {cache}")
    return build(cache, seed, progress)


def quickstart_experiment(output: Path, seed: int, progress: Progress) -> Experiment:
    """The experiment; what building its parts took is kept beside it."""
    start = time.perf_counter()
    parts = quickstart_parts(seed, progress)
    seconds = time.perf_counter() - start
    progress.say(f"parts: ready after {seconds:.0f} s")
    write_json(output / "quickstart" / COST, asdict(Cost(seconds=seconds)))
    return Experiment(
        output=output,
        seed=seed,
        base=BaseConfig(model=str(parts.base)),
        data=DataConfig(path=str(parts.prompts), validation=32, test=64),
        generation={"max_new_tokens": 28, "do_sample": False},
        objectives={
            "reflection": ObjectiveConfig(function="classifier", options={"model": str(parts.reflection)}),
            "empathy": ObjectiveConfig(function="classifier", options={"model": str(parts.empathy)}),
            "fluency": ObjectiveConfig(function="likelihood", options={"model": str(parts.fluency), "scale": "inverse"}),
        },
        train=TrainConfig(
            lora={"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
            grpo={
                "per_device_train_batch_size": 64,
                "num_generations": 8,
                "learning_rate": 1e-3,
                "beta": 0.02,
                "max_steps": 40,
                "eval_steps": 8,
            },
            convergence=ConvergenceConfig(threshold=0.0),
        ),
        search=SearchConfig(levels=4, batch=16),
        value=ValueConfig(scalarize="minimum"),
    )
