"""The small experiment for several seeds of its agents, and with agents trained at other span lengths.

    python -m recipes.rlae.compare --seeds 0 1 2

All seeds share the specialists and the test problems. What is finished is skipped, a killed run continues.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from emorl.config.experiment import load_experiment
from emorl.reporting.dynamic_table import dynamic_table
from emorl.runs.console import Console
from emorl.stages.stage import perform
from recipes.rlae.specialists import OPERATIONS, make

EXPERIMENT = Path(__file__).parent / "experiment.yaml"


def overrides_of(root: Path, seed: int, rest: Sequence[str]) -> list[str]:
    """The experiment below another folder."""
    specialists = root / "specialists"
    models = ", ".join(f"{name}: {specialists / name}" for name in OPERATIONS)
    return [
        f"output={root}/seed-{seed}",
        f"seed={seed}",
        f"base.model={specialists}/base",
        f"data.path={specialists}/problems.jsonl",
        f"dynamic.models={{{models}}}",
        *rest,
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--spans", type=int, nargs="*", default=[1, 2, 10, 15], help="more lengths to train PPO at")
    parser.add_argument("--output", type=Path, default=Path("runs/rlae"), help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of base and specialists (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that replace the experiment's")
    options = parser.parse_args(arguments)
    rows = []
    make(options.output / "specialists", options.steps, options.steps)
    for seed in options.seeds:
        experiment = load_experiment(EXPERIMENT, overrides_of(options.output, seed, options.overrides))
        result = perform("dynamic", experiment, Console())
        print(f"seed {seed}: {dynamic_table(result)}\n", flush=True)
        rows += [{"seed": seed, "trained at": experiment.dynamic.span, **asdict(system)} for system in result.systems]
        for span in options.spans:
            more = [*options.overrides, f"output={options.output}/seed-{seed}-span-{span}", f"dynamic.span={span}"]
            more += ["dynamic.agents=[ppo]", f"dynamic.spans=[{span}]"]
            other = load_experiment(EXPERIMENT, [*overrides_of(options.output, seed, []), *more])
            systems = perform("dynamic", other, Console()).systems
            rows += [{"seed": seed, "trained at": span, **asdict(system)} for system in systems if system.name == "RLAE-PPO"]
    table = pd.DataFrame(rows).fillna({"span": 0})
    table.drop(columns=["scores", "mean_weights"]).to_csv(options.output / "systems.csv", index=False)
    grouped = table.groupby(["name", "trained at", "span"], sort=False)
    print(grouped[["value", "gain", "tokens_per_second", "choosing_share"]].agg(["mean", "std"]).round(3).to_string())


if __name__ == "__main__":
    main()
