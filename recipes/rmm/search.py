"""Reinforced model merging (arXiv 2503.21272) against its rivals on small classifiers, at equal evaluations and on subsets.

    python -m recipes.rmm.search vision --seeds 0 1 2
    python -m recipes.rmm.search text --seeds 0 --shares 1.0 0.05

Every search may try `--episodes` plans. With a share below 1 each plan answers only that part of the validation examples, the
next part of a fixed order, and its reward is its gain over the single columns on the same part; at the end the best few are
answered in full. What was found is judged on test examples. Studies are journals: a killed search continues.
"""

import argparse
import functools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from emorl.fusion.merging_map import MergingSpace, Plan, assemble, count_blocks
from emorl.search.coordinate_descent import CoordinateDescent, RandomPlans
from emorl.search.optuna_samplers import OptunaProposer
from emorl.search.reinforced_merging import COLUMN_SCORES, PPOSettings, ReinforcedMerging
from emorl.search.study import Budget, Finished, Params, Proposer, Scored, finished_trials, open_study, search
from emorl.search.weight_search import silence_optuna
from recipes.rmm.classifiers import Setting, correct, text, vision

HOST = "ties"
"""the column whose embeddings and norms every plan has (the paper: its first merge's)"""
_ANSWERED_AGAIN = 8  # plans, in full, after a search on subsets


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
        [size] = {len(one.labels) for one in setting.validation.values()}
        order = torch.from_numpy(np.random.default_rng(0).permutation(size))
        self._parts = order.split(max(1, round(share * size)))
        self._next = len(known)
        self._columns_on: dict[int, list[list[float]]] = {}  # part -> what the single columns score on it
        self.answered = int(known[-1].notes["answered"]) if known else 0

    def accuracies(self, plan: Plan, rows: torch.Tensor | None = None, *, test: bool = False) -> list[float]:
        """Of each task, on some validation examples (all by default), or on the test examples."""
        model = assemble(self._columns, plan, host=self._host)
        found = []
        for name, head in self._setting.heads.items():
            examples = (self._setting.test if test else self._setting.validation)[name]
            some = examples if rows is None else examples.some(rows)
            found.append(float(correct(model, head, some).mean()))
            self.answered += 0 if test else len(some.labels)
        return found

    def __call__(self, candidates: Sequence[Params]) -> list[Scored]:
        return [self._scored(candidate) for candidate in candidates]

    def _scored(self, candidate: Params) -> Scored:
        start, part = time.perf_counter(), self._next % len(self._parts)
        self._next += 1
        scores = tuple(self.accuracies(plan_of(self._space, candidate), self._parts[part]))
        notes = {} if len(self._parts) == 1 else {COLUMN_SCORES: self._of_columns(part)}
        return Scored(scores, {**notes, "answered": self.answered, "seconds": time.perf_counter() - start})

    def _of_columns(self, part: int) -> list[list[float]]:
        if part not in self._columns_on:
            corners = [plan_of(self._space, corner) for corner in self._space.corners()]
            self._columns_on[part] = [self.accuracies(plan, self._parts[part]) for plan in corners]
        return self._columns_on[part]


def plan_of(space: MergingSpace, params: Params) -> Plan:
    plan = space.plan(params)
    assert plan is not None, "a candidate"
    return plan


def gain(trial: Finished) -> float:
    """Value, less that of the single columns on the same examples where these are a part of all."""
    rivals = trial.notes.get(COLUMN_SCORES)
    return float(np.mean(trial.scores)) - (0.0 if rivals is None else float(np.mean(rivals)))


def proposers(space: MergingSpace, share: float, episodes: int, seed: int) -> dict[str, Proposer]:
    """The searches that make sense on such parts of the examples."""
    settings = PPOSettings(episodes=episodes)
    found: dict[str, Proposer] = {f"rmm {share:.0%}": ReinforcedMerging(space, mean_value, seed, settings)}
    if share < 1:
        averaged = PPOSettings(episodes=episodes, reward="dynamic_average", episodes_per_pass=round(1 / share))
        return {**found, f"rmm {share:.0%}, DAR": ReinforcedMerging(space, mean_value, seed, averaged)}
    return {
        **found,
        "random": RandomPlans(space, seed),
        "coordinate descent": CoordinateDescent(space, mean_value),
        "tpe": OptunaProposer("tpe", space, 1, mean_value, seed),
        "cma_es": OptunaProposer("cma_es", space, 1, mean_value, seed),
    }


def run(
    setting: Setting, space: MergingSpace, name: str, proposer: Proposer, share: float, episodes: int, path: Path
) -> list[dict]:
    """One search: what it would choose after some shares of its plans, on all validation and on the test examples."""
    study = open_study(path / f"{name.replace(' ', '-').replace(',', '')}.log", list(setting.heads), name)
    evaluator = PlanEvaluator(setting, space, share, finished_trials(study))
    finished = search(study, proposer, evaluator, space.distributions, batch=8, budget=Budget(trials=episodes))
    judge, rows = PlanEvaluator(setting, space, 1.0, []), []
    whole = functools.cache(lambda plan: float(np.mean(judge.accuracies(plan))))
    tested = functools.cache(lambda plan: float(np.mean(judge.accuracies(plan, test=True))))
    each = sum(len(one.labels) for one in setting.validation.values())
    for count in sorted({min(len(finished), round(episodes * part)) for part in (0.1, 0.25, 0.5, 1.0)}):
        best = sorted(finished[:count], key=gain, reverse=True)[: 1 if share == 1 else _ANSWERED_AGAIN]
        chosen = max((plan_of(space, trial.params) for trial in best), key=whole)
        rows.append(
            {
                "search": name,
                "plans": count,
                "examples": finished[count - 1].notes["answered"] + (0 if share == 1 else each * len(best)),
                "validation": whole(chosen),
                "test": tested(chosen),
                "depth": len(chosen),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=["vision", "text"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=300, help="plans of every search (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of each model's training (%(default)s)")
    parser.add_argument("--examples", type=int, default=500, help="most of each task to validate on (%(default)s)")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.1, 0.05], help="of the examples per plan")
    parser.add_argument("--skip", action="store_true", help="plans may leave out layers")
    parser.add_argument("--back", action="store_true", help="plans may use layers again")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="of the texts (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/rmm"), help="(%(default)s)")
    options = parser.parse_args(arguments)
    silence_optuna()
    rows = []
    for seed in options.seeds:
        setting = vision(seed, options.steps) if options.setting == "vision" else text(seed, options.data, options.steps)
        some = {
            name: one.some(torch.arange(min(options.examples, len(one.labels)))) for name, one in setting.validation.items()
        }
        setting = replace(setting, validation=some)
        columns = list(setting.columns.values())
        space = MergingSpace(len(columns), count_blocks(columns[0]), allow_skip=options.skip, allow_back=options.back)
        judge = PlanEvaluator(setting, space, 1.0, [])
        for name, corner in zip(setting.columns, space.corners(), strict=True):
            both = [float(np.mean(judge.accuracies(plan_of(space, corner), test=test))) for test in (False, True)]
            rows.append({"seed": seed, "search": f"column {name}", "plans": 1, "validation": both[0], "test": both[1]})
        for share in options.shares:
            path = options.output / f"{options.setting}{'-skip' * options.skip}{'-back' * options.back}" / f"seed-{seed}"
            for name, proposer in proposers(space, share, options.episodes, seed).items():
                found = run(setting, space, name, proposer, share, options.episodes, path)
                rows += [{"seed": seed, **one} for one in found]
                print(f"seed {seed}, {name}: {found[-1]}", flush=True)
        table = pd.DataFrame(rows)
        table.to_csv(options.output / f"{options.setting}.csv", index=False)
    grouped = table.drop(columns=["seed"]).groupby(["search", "plans"], sort=False)
    print(grouped.agg(["mean", "std"]).round(4).to_string())


if __name__ == "__main__":
    main()
