"""Reinforced model merging (arXiv 2503.21272) against its rivals on small classifiers, at equal evaluations and on subsets.

    python -m recipes.rmm.search vision --seeds 0 1 2
    python -m recipes.rmm.search text --seeds 0 --steps 60 --examples 250 --plans 40 --shares 1.0 0.1 --rivals random

Every search tries `--plans` plans. With a share below 1 each plan answers only that part of the validation examples, the next
part of a fixed order, and its reward is its gain over one column on the same part; the plan is then chosen by successive
halving. What was found is judged on test examples. Studies are journals: a killed search continues.
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from emorl.fusion.assembly import assemble, count_blocks
from emorl.fusion.merging_map import MergingSpace, Plan
from emorl.search.proposers.coordinate_descent import CoordinateDescent, RandomPlans
from emorl.search.proposers.optuna_samplers import OptunaProposer
from emorl.search.proposers.reinforced_merging import COLUMN_SCORES, PPOSettings, ReinforcedMerging
from emorl.search.study import Budget, Finished, Params, Proposer, Scored, finished_trials, open_study, search
from emorl.search.weights import silence_optuna
from recipes.rmm.classifiers import Setting, accuracies, text, vision

HOST = "ties"
"""the column whose embeddings and norms every plan has (the paper: its first merge's), and that it is compared with on parts"""
RIVALS = ("random", "coordinate descent", "tpe", "cma_es")
_ROUNDS = ((16, 0.2), (3, 1.0))
"""after a search on parts: so many of the best plans answer so much of all examples"""
_STOPS = (0.1, 0.25, 0.5, 1.0)  # of all plans, where the curve is drawn


def mean_value(finished: Sequence[Finished]) -> list[float]:
    return [float(np.mean(trial.scores)) for trial in finished]


class PlanEvaluator:
    """Plans -> accuracy of each task on the next part of the validation examples; counts the examples answered.

    Args:
        share: of the examples in one part; the parts of a fixed order come round again and again.
        known: plans evaluated in earlier runs.
    """

    def __init__(self, setting: Setting, space: MergingSpace, share: float, known: Sequence[Finished]) -> None:
        self._setting, self._space = setting, space
        self._columns, self._host = list(setting.columns.values()), list(setting.columns).index(HOST)
        [size] = {len(one.validation.labels) for one in setting.questions}
        self._parts = torch.arange(size).split(max(1, round(share * size)))
        self._next = len(known)
        self._host_on: dict[int, list[float]] = {}  # part -> what the host scores on it
        self.answered = int(known[-1].notes["answered"]) if known else 0

    def accuracies(self, plan: Plan, rows: torch.Tensor) -> list[float]:
        """Of each task, on some validation examples."""
        model, found = assemble(self._columns, plan, host=self._host), []
        for one in self._setting.questions:
            found += accuracies(model, one.head, one.validation.some(rows))
        self.answered += len(rows) * len(found)
        return found

    def tested(self, plan: Plan) -> float:
        """Mean accuracy on the test examples."""
        model = assemble(self._columns, plan, host=self._host)
        return float(np.mean([value for one in self._setting.questions for value in accuracies(model, one.head, one.test)]))

    def __call__(self, candidates: Sequence[Params]) -> list[Scored]:
        return [self._scored(candidate) for candidate in candidates]

    def _scored(self, candidate: Params) -> Scored:
        start, part = time.perf_counter(), self._next % len(self._parts)
        self._next += 1
        scores = tuple(self.accuracies(plan_of(self._space, candidate), self._parts[part]))
        notes = {} if len(self._parts) == 1 else {COLUMN_SCORES: [self._of_host(part)]}
        return Scored(scores, {**notes, "answered": self.answered, "seconds": time.perf_counter() - start})

    def _of_host(self, part: int) -> list[float]:
        if part not in self._host_on:
            alone = plan_of(self._space, self._space.corners()[self._host])
            self._host_on[part] = self.accuracies(alone, self._parts[part])
        return self._host_on[part]


class Judge:
    """What is known of plans beyond their search; counts as if each choice were the first."""

    def __init__(self, setting: Setting, space: MergingSpace) -> None:
        [self._size] = {len(one.validation.labels) for one in setting.questions}
        self._tasks = len(setting.tasks)
        evaluator = PlanEvaluator(setting, space, 1.0, [])
        self._on = functools.cache(lambda plan, rows: float(np.mean(evaluator.accuracies(plan, torch.arange(rows)))))
        self.tested = functools.cache(evaluator.tested)

    def value(self, plan: Plan, share: float = 1.0) -> float:
        """Mean accuracy on the first validation examples."""
        return self._on(plan, round(share * self._size))

    def choose(self, plans: Sequence[Plan]) -> tuple[Plan, int]:
        """The best by successive halving, and the examples answered for it; the most promising come first."""
        answered, before = 0, 0.0
        for count, share in _ROUNDS:
            kept = plans[:count]
            answered += len(kept) * round((share - before) * self._size) * self._tasks
            plans, before = sorted(kept, key=lambda plan: self.value(plan, share), reverse=True), share
        return plans[0], answered


def plan_of(space: MergingSpace, params: Params) -> Plan:
    plan = space.plan(params)
    assert plan is not None, "a candidate"
    return plan


def gain(trial: Finished) -> float:
    """Value, less that of the host on the same examples where these are a part of all."""
    rivals = trial.notes.get(COLUMN_SCORES)
    return float(np.mean(trial.scores)) - (0.0 if rivals is None else float(np.mean(rivals)))


def proposers(space: MergingSpace, share: float, plans: int, rivals: Sequence[str], seed: int) -> dict[str, Proposer]:
    """The searches on such parts of the examples; rivals see all."""
    settings = PPOSettings(episodes=2 * plans, entropy=0.1, patience=20)  # so that it does not end before its plans
    found: dict[str, Proposer] = {f"rmm {share:.0%}": ReinforcedMerging(space, mean_value, seed, settings)}
    if share < 1:
        averaged = replace(settings, episodes=plans, reward="dynamic_average", episodes_per_pass=round(1 / share))
        return {**found, f"rmm {share:.0%}, DAR": ReinforcedMerging(space, mean_value, seed, averaged)}
    every: dict[str, Callable[[], Proposer]] = {
        "random": lambda: RandomPlans(space, seed),
        "coordinate descent": lambda: CoordinateDescent(space, mean_value),
        "tpe": lambda: OptunaProposer("tpe", space, 1, mean_value, seed),
        "cma_es": lambda: OptunaProposer("cma_es", space, 1, mean_value, seed),
    }
    return found | {name: every[name]() for name in rivals}


def run(
    setting: Setting, space: MergingSpace, name: str, proposer: Proposer, share: float, plans: int, path: Path
) -> list[Finished]:
    """One search, begun or continued."""
    study = open_study(path / f"{name.replace(' ', '-').replace(',', '')}.log", setting.tasks, name)
    evaluator = PlanEvaluator(setting, space, share, finished_trials(study))
    return search(study, proposer, evaluator, space.distributions, batch=8, budget=Budget(trials=plans))


def draw(judge: Judge, space: MergingSpace, name: str, finished: Sequence[Finished], share: float, plans: int) -> list[dict]:
    """What a search would choose after some of its plans, on all validation and on the test examples."""
    rows = []
    for count in sorted({min(len(finished), max(1, round(plans * part))) for part in _STOPS}):
        best = [plan_of(space, trial.params) for trial in sorted(finished[:count], key=gain, reverse=True)]
        chosen, again = (best[0], 0) if share == 1 else judge.choose(best)
        rows.append(
            {
                "search": name,
                "plans": count,
                "examples": finished[count - 1].notes["answered"] + again,
                "validation": judge.value(chosen),
                "test": judge.tested(chosen),
                "depth": len(chosen),
            }
        )
    return rows


def needed(full: Sequence[Finished], value: float) -> float:
    """Examples that a search on all of them has answered when it first has a plan of this value; NaN: never."""
    return next((float(one.notes["answered"]) for one in full if np.mean(one.scores) >= value), float("nan"))


def search_seed(setting: Setting, space: MergingSpace, seed: int, options: argparse.Namespace, path: Path) -> list[dict]:
    """Every column, and every search on every share."""
    judge, rows, full = Judge(setting, space), [], list[Finished]()
    for name, corner in zip(setting.columns, space.corners(), strict=True):
        plan = plan_of(space, corner)
        rows.append({"search": f"column {name}", "plans": 1, "validation": judge.value(plan), "test": judge.tested(plan)})
    for share in options.shares:
        for name, proposer in proposers(space, share, options.plans, options.rivals, seed).items():
            finished = run(setting, space, name, proposer, share, options.plans, path)
            curve = draw(judge, space, name, finished, share, options.plans)
            full = finished if name == "rmm 100%" else full
            rows += [{**one, "rmm_100%_needs": needed(full, one["validation"])} for one in curve]
            print(f"seed {seed}, {rows[-1]}", flush=True)
    return [{"seed": seed, **row} for row in rows]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=["vision", "text"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plans", type=int, default=150, help="of every search (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="of each model's training (%(default)s)")
    parser.add_argument("--examples", type=int, default=3000, help="most of each task to validate and to test on (%(default)s)")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.05], help="of the examples per plan")
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS), help="(all)")
    parser.add_argument("--skip", action="store_true", help="plans may leave out layers")
    parser.add_argument("--back", action="store_true", help="plans may use layers again")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="of the texts (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/rmm"), help="(%(default)s)")
    options = parser.parse_args(arguments)
    silence_optuna()
    rows = []
    for seed in options.seeds:
        setting = vision(seed, options.steps) if options.setting == "vision" else text(seed, options.data, options.steps)
        setting = setting.shortened(options.examples)
        columns = list(setting.columns.values())
        space = MergingSpace(len(columns), count_blocks(columns[0]), allow_skip=options.skip, allow_back=options.back)
        path = options.output / f"{options.setting}{'-skip' * options.skip}{'-back' * options.back}" / f"seed-{seed}"
        rows += search_seed(setting, space, seed, options, path)
        table = pd.DataFrame(rows)
        table.to_csv(options.output / f"{options.setting}.csv", index=False)
    grouped = table.drop(columns=["seed"]).groupby(["search", "plans"], sort=False)
    print(grouped.agg(["mean", "std"]).round(4).to_string())


if __name__ == "__main__":
    main()
