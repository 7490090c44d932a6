"""Proposers and candidates of a search for fusions, as the block `fuse` names them."""

import importlib
from collections.abc import Sequence

from emorl.config import UserError, nearest
from emorl.config.fuse import PolicyFuseConfig
from emorl.fusion.operators import Fusion, check_fusion
from emorl.objectives.scalarize import Value
from emorl.search.moving_set import MovingSet
from emorl.search.proposers.coordinate_descent import CoordinateDescent
from emorl.search.proposers.optuna_samplers import SAMPLERS, OptunaProposer
from emorl.search.proposers.q_learning import QLearning, QSettings
from emorl.search.proposers.settings_descent import SettingsDescent
from emorl.search.spaces.fusion_space import FusionSpace
from emorl.search.spaces.layer_space import LayerSpace
from emorl.search.study import Proposer, Valuation

Q_LEARNING, SETTINGS_DESCENT = "q_learning", "settings_descent"
REINFORCED_MERGING, COORDINATE_DESCENT = "reinforced_merging", "coordinate_descent"
_OVER_LAYERS = (REINFORCED_MERGING, COORDINATE_DESCENT)

Space = FusionSpace | LayerSpace


def check_fusion_proposer(config: PolicyFuseConfig, policies: int) -> None:
    """Refuses a name that is none, and methods that so many policies cannot be fused by."""
    proposers = [Q_LEARNING, SETTINGS_DESCENT, *_OVER_LAYERS, *SAMPLERS]
    if config.proposer is None:
        return
    if config.proposer not in proposers:
        raise UserError(f"fuse.proposer: no proposer is called {config.proposer!r}; {nearest(config.proposer, proposers)}")
    for method in config.methods:
        check_fusion(Fusion(method, (1.0,) * policies), policies, has_base=True)


def fusion_space(config: PolicyFuseConfig, policies: Sequence[str], modules: Sequence[str]) -> Space:
    """The candidates; `modules` are those that the policies adapt."""
    if config.proposer in _OVER_LAYERS:
        return LayerSpace(tuple(policies), tuple(config.methods), tuple(modules))
    return FusionSpace(tuple(policies), tuple(config.methods), tuple(config.scales), config.step, config.settings)


def fusion_proposer(
    config: PolicyFuseConfig, space: Space, of_trials: Valuation, value: Value, moving_set: MovingSet | None, seed: int
) -> Proposer:
    """The proposer that the config names.

    Raises:
        UserError: the extra that it needs is not installed.
    """
    assert config.proposer is not None
    if isinstance(space, LayerSpace):
        if config.proposer == COORDINATE_DESCENT:
            return CoordinateDescent(space.merging, of_trials)
        try:
            merging = importlib.import_module("emorl.search.proposers.reinforced_merging")  # needs the extra `rl`
        except ModuleNotFoundError as error:
            raise UserError(f"reinforced_merging needs {error.name}: pip install 'emorl[rl]'") from None
        return merging.ReinforcedMerging(space.merging, of_trials, seed, merging.PPOSettings(episodes=config.trials))
    if config.proposer == SETTINGS_DESCENT:
        return SettingsDescent(space, of_trials)
    if config.proposer == Q_LEARNING:
        q = config.q_learning
        settings = QSettings(q.alpha, q.gamma, (q.epsilon_start, q.epsilon_end), q.exploration, q.learning_rate)
        gain = None if moving_set is None else moving_set.gain(value.importance)
        return QLearning(space, of_trials, config.trials, seed, settings, gain)
    return OptunaProposer(config.proposer, space, len(value.importance), of_trials, seed)
