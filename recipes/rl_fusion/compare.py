"""RL-Fusion's Q-learning against its rivals at equal evaluations, on policies of several seeds, judged on test prompts.

    python -m recipes.rl_fusion.compare recipes/rl_fusion/experiment.yaml

Every search sees the same validation prompts and the same number of candidates; merges with equal weights cost one. What was
found answers test prompts that no search and no training saw. Finished searches are skipped, a killed one continues.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from peft import PeftModel

from emorl.config.experiment import Experiment, load_experiment
from emorl.config.fuse import PolicyFuseConfig
from emorl.evaluation.scoring import evaluate, summarize
from emorl.runs.console import Console
from emorl.runs.results import FusionResult
from emorl.runs.run import written_whole
from emorl.stages.materials import Materials
from emorl.stages.stage import perform

SEARCHES = ("q_learning", "random", "tpe", "cma_es", "settings_descent", "reinforced_merging", "coordinate_descent")
"""the last two choose layer by layer"""
MERGES = ("linear", "slerp", "ties")


def variants(experiment: Experiment, policies: str, seeds: Sequence[int]) -> Iterator[tuple[str, int, Experiment]]:
    """Name, seed and experiment of every search and equal merge; the prompts are split alike in all.

    Args:
        policies: folder of the trained policies, with {seed} in it.
    """
    for seed in seeds:
        of_seed = replace(
            experiment,
            seed=seed,
            data=replace(experiment.data, seed=experiment.seed),
            policies=Path(policies.format(seed=seed)),
        )
        for name in SEARCHES:
            settings = replace(experiment.fuse, proposer=name)
            yield name, seed, replace(of_seed, output=experiment.output / f"seed-{seed}" / name, fuse=settings)
        for method in MERGES:
            name = f"equal {method}"
            settings = PolicyFuseConfig(method=method)
            yield name, seed, replace(of_seed, output=experiment.output / f"seed-{seed}" / f"equal-{method}", fuse=settings)


def judged(experiment: Experiment, materials: Materials) -> dict[str, float]:
    """The fused policy on the test prompts."""
    base = materials.own_base()
    policy = PeftModel.from_pretrained(base.model, str(experiment.output / "fuse" / "policy")).eval()
    table = evaluate(policy, base.tokenizer, materials.splits.test, materials.objectives, experiment.generation).table
    table.to_parquet(experiment.output / "fuse" / "test.parquet", index=False)
    return summarize(table, list(experiment.objectives))


def row(name: str, seed: int, result: FusionResult, materials: Materials) -> dict[str, float | str]:
    """One fusion: what it is, what the search thought of it, and what the test prompts say."""
    experiment = materials.experiment
    path = experiment.output / "fuse" / "trials.csv"
    trials = pd.read_csv(path) if path.exists() else pd.DataFrame({"value": [], "seconds": []})
    objectives = list(experiment.objectives)
    test = judged(experiment, materials)
    return {
        "method": name,
        "seed": seed,
        "fusion": result.method or "by layer",
        "validation": float("nan") if result.value is None else result.value,
        "test_mean": test["mean"],
        **{f"test_{objective}": test[objective] for objective in objectives},
        "distinct_share": test["distinct_share"],
        "evaluations": len(trials),
        "seconds": trials["seconds"].sum(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--policies", default="runs/counselling_methods/seed-{seed}/ensemble", help="(%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)
    experiment = load_experiment(options.experiment, options.overrides)
    rows, materials = [], Materials(experiment)
    for name, seed, variant in variants(experiment, options.policies, options.seeds):
        Console().say(f"seed {seed}, {name}")
        result = perform("fuse", variant, Console(), materials.of(variant))
        rows.append(row(name, seed, result, materials.of(variant)))
    table = pd.DataFrame(rows)
    with written_whole(experiment.output / "comparison.csv") as temporary:
        table.to_csv(temporary, index=False)
    numbers = table.drop(columns=["seed", "fusion"]).groupby("method", sort=False)
    print(numbers.agg(["mean", "std"]).round(3).to_string())
    print(table[["method", "seed", "fusion", "validation", "test_mean"]].round(3).to_string(index=False))


if __name__ == "__main__":
    main()
