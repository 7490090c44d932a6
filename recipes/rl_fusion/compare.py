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
from emorl.data import load_prompts
from emorl.evaluation.scoring import evaluate, summarize
from emorl.objectives.loading import load_objective
from emorl.policies.base import load_base, load_tokenizer
from emorl.policies.prompts import is_chat
from emorl.runs.console import Console
from emorl.runs.run import written_whole
from emorl.search.fusion_result import read_fusion
from emorl.search.fusion_search import fuse_policies
from emorl.search.weight_search import silence_optuna

SEARCHES = ("q_learning", "random", "tpe", "cma_es", "settings_descent", "reinforced_merging", "coordinate_descent")
"""the last two choose layer by layer"""
MERGES = ("linear", "slerp", "ties")


def variants(experiment: Experiment, policies: str, seeds: Sequence[int]) -> Iterator[tuple[str, int, Experiment]]:
    """Name, seed and experiment of every search and equal merge; the prompts are split alike in all.

    Args:
        policies: folder of the trained policies, with {seed} in it.
    """
    for seed in seeds:
        own = replace(
            experiment,
            seed=seed,
            data=replace(experiment.data, seed=experiment.seed),
            policies=Path(policies.format(seed=seed)),
        )
        for name in SEARCHES:
            settings = replace(experiment.fuse, proposer=name)
            yield name, seed, replace(own, output=experiment.output / f"seed-{seed}" / name, fuse=settings)
        for method in MERGES:
            name = f"equal {method}"
            settings = PolicyFuseConfig(method=method)
            yield name, seed, replace(own, output=experiment.output / f"seed-{seed}" / f"equal-{method}", fuse=settings)


def judged(experiment: Experiment) -> dict[str, float]:
    """The fused policy on the test prompts."""
    base = load_base(experiment.base)
    policy = PeftModel.from_pretrained(base.model, str(experiment.output / "fuse" / "policy")).eval()
    data = load_prompts(experiment.data, experiment.seed, is_chat(load_tokenizer(experiment.base.model))).test
    objectives = [load_objective(name, config) for name, config in experiment.objectives.items()]
    table = evaluate(policy, base.tokenizer, data, objectives, experiment.generation).table
    table.to_parquet(experiment.output / "fuse" / "test.parquet", index=False)
    return summarize(table, list(experiment.objectives))


def row(name: str, seed: int, experiment: Experiment) -> dict[str, float | str]:
    """One fusion: what it is, what the search thought of it, and what the test prompts say."""
    found, path = read_fusion(experiment), experiment.output / "fuse" / "trials.csv"
    trials = pd.read_csv(path) if path.exists() else pd.DataFrame({"value": [], "seconds": []})
    objectives = list(experiment.objectives)
    test = judged(experiment)
    return {
        "method": name,
        "seed": seed,
        "fusion": found.get("method", "by layer"),
        "validation": found.get("value", float("nan")),
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
    silence_optuna()
    experiment = load_experiment(options.experiment, options.overrides)
    rows = []
    for name, seed, one in variants(experiment, options.policies, options.seeds):
        Console().say(f"seed {seed}, {name}")
        fuse_policies(one, Console())
        rows.append(row(name, seed, one))
    table = pd.DataFrame(rows)
    with written_whole(experiment.output / "comparison.csv") as temporary:
        table.to_csv(temporary, index=False)
    numbers = table.drop(columns=["seed", "fusion"]).groupby("method", sort=False)
    print(numbers.agg(["mean", "std"]).round(3).to_string())
    print(table[["method", "seed", "fusion", "validation", "test_mean"]].round(3).to_string(index=False))


if __name__ == "__main__":
    main()
