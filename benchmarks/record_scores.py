"""Records what an exhaustive search would see: every point of a lattice of weights, scored on every prompt.

The policies are those of finished runs on one base (`emorl train`); several runs may be put together. The table is what
`benchmarks.proposers` measures regret against.

    python -m benchmarks.record_scores runs/counselling --steps 32 --prompts 64 --name counselling-3
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.aggregation.trie import TrieDecoder, plain_greedy
from emorl.config.experiment import load_kept_experiment
from emorl.data import load_prompts
from emorl.evaluation.memo import ScoreMemo
from emorl.evaluation.scoring import completions_table, score
from emorl.objectives.loading import load_objective
from emorl.policies.base import load_base, read_policies
from emorl.policies.prompts import encode, is_chat
from emorl.runs.layout import Layout

TABLES = Path(__file__).parent / "score_tables"
_AT_ONCE = 64  # candidates


def lattice(policies: int, steps: int) -> np.ndarray:
    """All weights of whole `1 / steps` that sum to 1: (N, policies)."""
    bars = itertools.combinations(range(steps + policies - 1), policies - 1)
    edges = np.array([(-1, *bar, steps + policies - 1) for bar in bars])
    return (np.diff(edges, axis=1) - 1) / steps


def record(runs: Sequence[Path], policies: Sequence[str], steps: int, prompts: int) -> dict[str, np.ndarray]:
    """The table's arrays: weights (N, d), scores (N, P, O), policies (d,), objectives (O,)."""
    experiment = load_kept_experiment(runs[0])
    base = load_base(experiment.base)
    directories = {
        f"{run.name}/{name}": path
        for run in runs
        for name, path in Layout(run).trained(load_kept_experiment(run).policy_names).items()
    }
    chosen = {name: path for name, path in directories.items() if not policies or name in policies}
    include_base = "base" in policies
    ensemble = HiddenStateEnsemble(base.model, read_policies(chosen, base), include_base=include_base)
    data = load_prompts(experiment.data, experiment.seed, is_chat(base.tokenizer))
    rows = data.train.select(range(prompts))
    objectives = [load_objective(name, config) for name, config in experiment.objectives.items()]
    greedy = plain_greedy(ensemble, experiment.generation)
    assert greedy is not None, "tables are recorded with plain greedy decoding"
    trie = TrieDecoder(ensemble, **encode(base.tokenizer, list(rows["prompt"])), **greedy)
    weights = lattice(len(ensemble.policy_names), steps)
    scores = []
    with ScoreMemo(None) as memo:
        for start in range(0, len(weights), _AT_ONCE):
            part = torch.from_numpy(weights[start : start + _AT_ONCE]).float()
            tokens = trie.decode(part).flatten(0, 1)
            order = [(index, 0) for index in range(prompts)] * len(part)
            table = score(completions_table(base.tokenizer, list(rows["prompt"]), order, tokens), rows, objectives, memo)
            scores.append(table[list(experiment.objectives)].to_numpy().reshape(len(part), prompts, -1))
            print(f"{start + len(part)} of {len(weights)} candidates, {trie.work}", flush=True)
    return {
        "weights": weights.astype(np.float32),
        "scores": np.concatenate(scores).astype(np.float16),
        "policies": np.array(ensemble.policy_names),
        "objectives": np.array(list(experiment.objectives)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories with trained policies on the same base")
    parser.add_argument("--policies", nargs="*", default=[], help="run/policy names, and base; default: all policies")
    parser.add_argument("--steps", type=int, required=True, help="the lattice's step is one over this")
    parser.add_argument("--prompts", type=int, default=64, help="training prompts")
    parser.add_argument("--name", required=True, help="of the table in benchmarks/score_tables/")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    table = record(options.runs, options.policies, options.steps, options.prompts)
    TABLES.mkdir(exist_ok=True)
    np.savez_compressed(TABLES / f"{options.name}.npz", **table)
    print(f"{options.name}: {table['scores'].shape} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
