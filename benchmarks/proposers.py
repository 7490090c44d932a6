"""Which proposer finds good weights soonest? Regret against the exhaustive grid, for 2 to 6 policies.

Regret is what is lost by taking the candidate with the best *observed* value so far: the best true value of the exhaustive
table minus the chosen candidate's true value, in percent of (best - mean) of that table, so that 100 is a blind choice.

Recorded problems are `benchmarks/score_tables/*.npz` (made by `benchmarks.record_scores` from trained policies) and, with
one policy less, their faces. A proposed point is looked up at the nearest lattice point. The search sees the means over a
random half of the prompts, the same half for all candidates; the true value is the mean over all prompts.

Synthetic problems are functions of the weights w, sampled on a lattice: `inside` and `edge`, 1 - |w - o|^2 with the optimum o
in the middle of the simplex or between two policies, somewhat off any grid; `bumps`, the higher of two Gaussians of width 0.25.
Each candidate's value gets Gaussian noise of the given standard deviation, the same whenever it is asked again.

    python -m benchmarks.proposers --seeds 3
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna

from benchmarks.record_scores import TABLES, lattice
from emorl.search.proposers.hierarchical_grid import HierarchicalGrid
from emorl.search.proposers.optuna_samplers import SAMPLERS, OptunaProposer
from emorl.search.proposers.simplex_refinement import SimplexRefinement
from emorl.search.spaces.weight_space import WeightSpace
from emorl.search.study import Finished, Proposer

BUDGETS = (10, 20, 40, 70, 100, 200)
COMPARED = (40, 100, 200)
LEVELS = 5
STEPS = {2: 64, 3: 32, 4: 16, 5: 10, 6: 8}  # of the synthetic lattices
GRIDS = {"hierarchical_grid": HierarchicalGrid, "simplex_refinement": SimplexRefinement}
SLOW = "gp"  # fits a model at each proposal: one seed, and 40 evaluations
SLOW_MOST = 40


@dataclass(frozen=True)
class Problem:
    """A table of candidates; `scores` (N, P, O) for recorded ones, where synthetic ones have one prompt and objective."""

    name: str
    kind: str
    weights: np.ndarray  # (N, d)
    scores: np.ndarray
    noise: float = 0.0

    @property
    def policies(self) -> int:
        return self.weights.shape[1]

    def true_values(self) -> np.ndarray:
        return self.scores.mean((1, 2))

    def observed(self, seed: int) -> np.ndarray:
        """(N, O): what a search with this seed is told."""
        generator = np.random.default_rng(seed)
        prompts = self.scores.shape[1]
        seen = generator.permutation(prompts)[: max(1, prompts // 2)]
        means = self.scores[:, seen].mean(1)
        return means + self.noise * generator.normal(size=means.shape)


def recorded(folder: Path) -> Iterator[Problem]:
    """The tables in a folder, and all faces of those with more than two policies."""
    for file in sorted(folder.glob("*.npz")):
        with np.load(file) as table:
            weights, scores = table["weights"].astype(float), table["scores"].astype(float)
        yield Problem(file.stem, "recorded", weights, scores)
        for left_out in range(weights.shape[1]) if weights.shape[1] > 2 else ():
            face = weights[:, left_out] == 0
            yield Problem(f"{file.stem}-{left_out}", "recorded", np.delete(weights[face], left_out, 1), scores[face])


def synthetic(policies: int, noises: Sequence[float]) -> Iterator[Problem]:
    weights = lattice(policies, STEPS[policies])
    ramp = np.arange(1, policies + 1) + 0.37
    middle, edge = ramp / ramp.sum(), np.zeros(policies)
    edge[:2] = 0.63, 0.37
    corner = np.roll(edge, -1)

    def bump(centre: np.ndarray) -> np.ndarray:
        return np.exp(-((weights - centre) ** 2).sum(1) / 2 / 0.25**2)

    shapes = {
        "inside": 1 - ((weights - middle) ** 2).sum(1),
        "edge": 1 - ((weights - edge) ** 2).sum(1),
        "bumps": np.maximum(bump(corner), 0.9 * bump(middle)),
    }
    for name, values in shapes.items():
        for noise in noises:
            yield Problem(f"{name}, noise {noise}", "synthetic", weights, values[:, None, None], noise)


def make(name: str, problem: Problem, seed: int) -> Proposer:
    space = WeightSpace(tuple(f"p{index}" for index in range(problem.policies)))
    if name in GRIDS:
        return GRIDS[name](space, LEVELS, mean)
    return OptunaProposer(name, space, problem.scores.shape[2], mean, seed)


def mean(finished: Sequence[Finished]) -> list[float]:
    return [float(np.mean(trial.scores)) for trial in finished]


def search(propose: Proposer, problem: Problem, seed: int, most: int) -> list[int]:
    """The table's rows in the order in which a search looks at them."""
    observed = problem.observed(seed)
    finished: list[Finished] = []
    rows: list[int] = []
    while len(finished) < most and (proposed := propose(finished)) is not None:
        for params in proposed[: most - len(finished)]:
            distance = ((problem.weights - list(params.values())) ** 2).sum(1)
            row = int(distance.argmin())
            rows.append(row)
            finished.append(Finished(len(finished), params, tuple(observed[row]), {}))
    return rows


def regrets(problem: Problem, rows: Sequence[int], seed: int) -> list[float]:
    """Percent, after each of the budgets (of all there was, where a proposer ended before)."""
    observed, true = problem.observed(seed).mean(1), problem.true_values()
    scale = max(float(true.max() - true.mean()), 1e-12)
    found = []
    for budget in BUDGETS:
        seen = list(rows[:budget])
        found.append(100 * (true.max() - true[seen[int(observed[seen].argmax())]]) / scale)
    return [float(regret) for regret in found]


def measure(name: str, problem: Problem, seeds: int) -> list[tuple[list[float], int]]:
    """Regrets and number of evaluations of each seed's search."""
    results = []
    for seed in range(1 if name == SLOW else seeds):
        rows = search(make(name, problem, seed), problem, seed, SLOW_MOST if name == SLOW else max(BUDGETS))
        results.append((regrets(problem, rows, seed), len(rows)))
    return results


def table(title: str, results: dict[str, list[tuple[list[float], int]]]) -> None:
    print(f"\n{title}\n\n| proposer | " + " | ".join(f"after {budget}" for budget in BUDGETS) + " | evaluations |")
    print("|---|" + "---|" * (len(BUDGETS) + 1))
    for name, runs in results.items():
        values = np.array([regret for regret, _ in runs])  # (searches, budgets)
        errors = values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.zeros(len(BUDGETS))
        cells = [f"{value:.1f} ± {error:.1f}" for value, error in zip(values.mean(0), errors, strict=True)]
        counts = [count for _, count in runs]
        print(f"| {name} | " + " | ".join(cells) + f" | {min(counts)}–{max(counts)} |", flush=True)


def winner(by_kind: Sequence[dict[str, list[tuple[list[float], int]]]], budget: int) -> str:
    """Lowest regret at a budget, recorded and synthetic problems counting half each."""
    column = BUDGETS.index(budget)
    means = {
        name: float(np.mean([np.mean([regret[column] for regret, _ in results[name]]) for results in by_kind]))
        for name in by_kind[0]
    }
    first, second = sorted(means, key=lambda name: means[name])[:2]
    return f"{first} ({means[first]:.1f}), {second} ({means[second]:.1f})"


def run(problems: Sequence[Problem], names: Sequence[str], seeds: int) -> dict[str, list[tuple[list[float], int]]]:
    results: dict[str, list[tuple[list[float], int]]] = {}
    for name in names:
        results[name] = [result for problem in problems for result in measure(name, problem, seeds)]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", type=int, default=[2, 3, 4, 5, 6])
    parser.add_argument("--proposers", nargs="+", default=[*GRIDS, *SAMPLERS], choices=[*GRIDS, *SAMPLERS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0, 0.02])
    parser.add_argument("--tables", type=Path, default=TABLES)
    parser.add_argument("--json", type=Path, help="also write all regrets to this file")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    start = time.perf_counter()
    print(f"optuna {optuna.__version__}, seeds 0 to {options.seeds - 1}; {SLOW}: seed 0, {SLOW_MOST} evaluations")
    tables = list(recorded(options.tables))
    kinds: dict[str, Callable[[int], list[Problem]]] = {
        "recorded": lambda count: [problem for problem in tables if problem.policies == count],
        "synthetic": lambda count: list(synthetic(count, options.noise)),
    }
    winners, everything = [], {}
    for count in options.policies:
        by_kind = []
        for kind, problems_of in kinds.items():
            if problems := problems_of(count):
                by_kind.append(run(problems, options.proposers, options.seeds))
                table(f"**{count} policies, {kind}** ({len(problems)} problems): regret in percent", by_kind[-1])
                everything[f"{count} {kind}"] = by_kind[-1]
        winners.append([str(count), *(winner(by_kind, budget) for budget in COMPARED)])
    print("\nLowest regret over both kinds, and the next\n")
    print("| policies | " + " | ".join(f"after {budget}" for budget in COMPARED) + " |\n|" + "---|" * (1 + len(COMPARED)))
    for row in winners:
        print("| " + " | ".join(row) + " |")
    print(f"\n{time.perf_counter() - start:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
