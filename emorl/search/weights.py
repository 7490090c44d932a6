"""Proposers and budget of a search for aggregation weights, as the block `search` names them."""

from dataclasses import fields

import optuna

from emorl.config import UserError, nearest
from emorl.config.experiment import SearchConfig
from emorl.search.proposers.hierarchical_grid import HierarchicalGrid
from emorl.search.proposers.optuna_samplers import SAMPLERS, OptunaProposer
from emorl.search.proposers.simplex_refinement import SimplexRefinement
from emorl.search.spaces.weight_space import WeightSpace
from emorl.search.study import Budget, Proposer, Valuation

GRIDS = {"hierarchical_grid": HierarchicalGrid, "simplex_refinement": SimplexRefinement}
AUTO = "auto"
_DEFAULT_TRIALS = 100


def check_proposer(config: SearchConfig) -> None:
    """Refuses a name that is none."""
    names = [AUTO, *GRIDS, *SAMPLERS]
    if config.proposer not in names:
        raise UserError(f"search.proposer: no proposer is called {config.proposer!r}; {nearest(config.proposer, names)}")


def chosen_proposer(config: SearchConfig) -> str:
    """What `auto` stands for: the proposer that `benchmarks/proposers.py` found best, whatever the number of policies."""
    return "simplex_refinement" if config.proposer == AUTO else config.proposer


def budget_of(config: SearchConfig) -> Budget:
    """The configured budget; without any, samplers that never end get a number of trials."""
    given = Budget(**{field.name: getattr(config, field.name) for field in fields(Budget)})
    return Budget(trials=_DEFAULT_TRIALS) if given == Budget() and config.proposer in SAMPLERS else given


def weight_proposer(
    config: SearchConfig, space: WeightSpace, value: Valuation, objectives: int, seed: int
) -> tuple[Proposer, int]:
    """The proposer, and about how many trials it will take."""
    name = chosen_proposer(config)
    if name in GRIDS:
        grid = GRIDS[name](space, config.levels, value)
        return grid, min(grid.expected_trials, config.trials or grid.expected_trials)
    return OptunaProposer(name, space, objectives, value, seed), config.trials or _DEFAULT_TRIALS


def silence_optuna() -> None:
    """Optuna reports every trial by default; the progress bar does that here."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
