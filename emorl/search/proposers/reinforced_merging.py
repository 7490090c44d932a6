"""Reinforced model merging (RMM, arXiv 2503.21272): PPO over merging maps, as a proposer of whole plans.

How a map changes is known and free, only a finished plan costs an evaluation: one candidate is one episode. The agent plays
`plans_per_update` episodes, waits until all have a value, and learns from them together; it is rebuilt by replaying that
over the finished trials. A plan that is known costs no evaluation and counts with its value.

Departures from the authors' code: illegal actions are masked, not punished with -10; the agent sees the cursor; gamma and
lambda are 1 (their 0.99 values early layers less for coming first); rewards are scaled by all rewards so far instead of
their buffer's (whose four plans may be one and the same); and the numbers in `PPOSettings`. By default a reward is paired
with the single columns' on the same data; the paper's dynamic average also mixes in the rewards of other plans.

Where evaluations are free of noise, `coordinate_descent` finds as good plans with fewer of them; under noise this is ahead.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from tensordict import TensorDict  # pyright: ignore[reportAttributeAccessIssue]  # not in its type stub
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import MLP, MaskedCategorical, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from emorl.config import UserError
from emorl.fusion.merging_map import MergingMap, MergingSpace, Plan, action_mask, is_finished, observation, step
from emorl.search.study import Finished, Params, Valuation

COLUMN_SCORES = "column_scores"
"""In a trial's notes, where plans are evaluated on changing subsets: the scores of one or more columns on the same subset."""

_LEAST_SCALE = 1e-8  # smaller differences between rewards are rounding


@dataclass(frozen=True)
class PPOSettings:
    """Of the search and its agent; in brackets the paper's code where it differs.

    On toys whose layers add up, of 6 to 24 layers, the plans it samples after 400 episodes have 0.91 to 0.97 of what is
    between a random plan and the best; with the paper's learning rates, epochs and batch 0.88 to 0.91, in six times the time.

    Args:
        episodes: plans in all, known ones included.
        plans_per_update: episodes the agent learns from together (4).
        epochs: over them, at each update (40).
        actor_learning_rate, critic_learning_rate: of Adam (3e-4 and 1e-3).
        entropy: weight of the bonus (0.0001).
        gradient_norm: at which gradients are clipped (not).
        target_kl: how far an update may move the policy before it ends (any).
        patience: updates in a row without a new plan, after which the search ends (never).
        reward: `paired` or `dynamic_average`.
        episodes_per_pass: of the dynamic average: it begins anew with each pass over the data (1 / data_scale).
        strength: of the dynamic average at the last episode.
    """

    episodes: int = 700
    plans_per_update: int = 8
    epochs: int = 10
    actor_learning_rate: float = 3e-3
    critic_learning_rate: float = 3e-3
    gamma: float = 1.0
    gae_lambda: float = 1.0
    clip: float = 0.2
    entropy: float = 0.01
    critic: float = 0.5
    gradient_norm: float = 0.5
    target_kl: float = 0.05
    patience: int = 5
    reward: Literal["paired", "dynamic_average"] = "paired"
    episodes_per_pass: int = 1
    strength: float = 0.8

    def __post_init__(self) -> None:
        for name in ("episodes", "plans_per_update", "epochs", "patience", "episodes_per_pass"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.reward not in ("paired", "dynamic_average"):
            raise UserError(f"reward: expected 'paired' or 'dynamic_average', got {self.reward!r}")


def paired_rewards(finished: Sequence[Finished], columns: Sequence[Finished], value: Valuation) -> list[float]:
    """Of each finished trial: its value less the mean value of the single columns on the same data.

    The columns' scores on that data are those in the trial's notes (`COLUMN_SCORES`); without them all trials saw the same
    data, and the columns' own trials are compared with. A mean of K rather than the best one: its noise is smaller.
    """
    rivals = [
        [replace(trial, scores=tuple(scores)) for scores in trial.notes[COLUMN_SCORES]]
        if COLUMN_SCORES in trial.notes
        else list(columns)
        for trial in finished
    ]
    values = list(value([*finished, *(rival for group in rivals for rival in group)]))
    rewards, start = [], len(finished)
    for own, group in zip(values, rivals, strict=False):
        rewards.append(own - float(np.mean(values[start : start + len(group)])))
        start += len(group)
    return rewards


def dynamic_average(rewards: Sequence[float], settings: PPOSettings) -> list[float]:
    """RMM's dynamic average reward: a moving average over the episodes, whose momentum grows from 0 to `strength`.

    R'_i = c R'_(i-1) + (1 - c) R_i with c = strength i / episodes; R'_i = R_i at the first episode i = 1 of each pass.
    """
    averaged: list[float] = []
    for index, reward in enumerate(rewards):
        momentum = settings.strength * (index + 1) / settings.episodes
        is_first = index % settings.episodes_per_pass == 0
        averaged.append(reward if is_first else momentum * averaged[-1] + (1 - momentum) * reward)
    return averaged


@dataclass(frozen=True)
class Episodes:
    """Some finished maps and the N steps to them, one episode after another."""

    plans: tuple[Plan, ...]
    data: TensorDict
    """(N): observation, mask, action, action_log_prob; next: observation, done, terminated"""


class Agent:
    """Actor and critic over merging maps, two MLPs of 64-64; the same seed and the same lessons give the same plans."""

    def __init__(self, space: MergingSpace, settings: PPOSettings, seed: int) -> None:
        self._space, self._settings = space, settings
        self._generator = torch.Generator().manual_seed(seed)
        width = len(observation(space, MergingMap()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._actor = MLP(width, space.columns + 2, num_cells=[64, 64], activation_class=nn.Tanh)
            critic = ValueOperator(MLP(width, 1, num_cells=[64, 64], activation_class=nn.Tanh), in_keys=["observation"])
        actor = ProbabilisticActor(  # for the loss only: called by itself it would not sample but take the mode
            TensorDictModule(self._actor, in_keys=["observation"], out_keys=["logits"]),
            in_keys=["logits", "mask"],
            distribution_class=MaskedCategorical,
        )
        self._advantage = GAE(gamma=settings.gamma, lmbda=settings.gae_lambda, value_network=critic)
        self._loss = ClipPPOLoss(
            actor,
            critic,
            clip_epsilon=settings.clip,
            entropy_coeff=settings.entropy,
            critic_coeff=settings.critic,
            loss_critic_type="l2",
        )
        rates = {actor: settings.actor_learning_rate, critic: settings.critic_learning_rate}
        self._optimizer = torch.optim.Adam([{"params": list(one.parameters()), "lr": rate} for one, rate in rates.items()])

    @torch.no_grad()
    def play(self, count: int) -> Episodes:
        """Some episodes side by side, sampled from the policy."""
        maps = [[MergingMap()] for _ in range(count)]
        taken: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in maps]  # mask, action, log probability
        while going := [index for index, path in enumerate(maps) if not is_finished(self._space, path[-1])]:
            mask = torch.tensor([action_mask(self._space, maps[index][-1]) for index in going])
            policy = MaskedCategorical(logits=self._actor(self._observe([maps[index][-1] for index in going])), mask=mask)
            actions = torch.multinomial(policy.probs, 1, generator=self._generator).squeeze(-1)
            for index, legal, action, chance in zip(going, mask, actions, policy.log_prob(actions), strict=True):
                taken[index].append((legal, action, chance))
                maps[index].append(step(self._space, maps[index][-1], int(action)))
        steps = itertools.chain.from_iterable(taken)
        mask, actions, log_probabilities = (torch.stack(column) for column in zip(*steps, strict=True))
        done = torch.tensor([[at is path[-1]] for path in maps for at in path[1:]])
        data = TensorDict(
            {
                "observation": self._observe([at for path in maps for at in path[:-1]]),
                "mask": mask,
                "action": actions,
                "action_log_prob": log_probabilities,
                "next": {
                    "observation": self._observe([at for path in maps for at in path[1:]]),
                    "done": done,
                    "terminated": done,
                },
            },
            batch_size=[len(done)],
        )
        return Episodes(tuple(path[-1].plan for path in maps), data)

    def learn(self, episodes: Episodes, rewards: Sequence[float]) -> None:
        """One PPO update; an episode's reward comes with its last step."""
        data = episodes.data.clone()
        done = data["next", "done"]
        data["next", "reward"] = torch.zeros(done.shape).masked_scatter(done, torch.tensor(rewards, dtype=torch.float32))
        with torch.no_grad():
            self._advantage(data)
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        for _ in range(self._settings.epochs):
            losses = self._loss(data)
            if losses["kl_approx"] > self._settings.target_kl:
                return
            self._optimizer.zero_grad()
            (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
            nn.utils.clip_grad_norm_(parameters, self._settings.gradient_norm)
            self._optimizer.step()

    def _observe(self, maps: Sequence[MergingMap]) -> Tensor:
        return torch.tensor([observation(self._space, at) for at in maps])


class ReinforcedMerging:
    """A proposer: each column alone, then the plans of one update at a time; None at the end, or when it finds nothing new.

    A function of the finished trials. What it has learnt from the first of them is kept between calls.
    """

    def __init__(self, space: MergingSpace, value: Valuation, seed: int, settings: PPOSettings = PPOSettings()) -> None:
        self._space, self._value, self._seed, self._settings = space, value, seed, settings
        self._begin([])

    def __call__(self, finished: Sequence[Finished]) -> list[Params] | None:
        trials = {tuple(self._space.vector(trial.params)): trial for trial in finished}
        columns = self._space.corners()
        missing = self._unknown(columns, trials)
        if missing:
            return missing
        if not self._learnt or self._known_by_then(finished) != self._learnt:
            self._begin([trials[tuple(self._space.vector(params))] for params in columns])
        while len(self._values) < self._settings.episodes and self._familiar < self._settings.patience:
            if self._played is None:
                left = self._settings.episodes - len(self._values)
                self._played = self._agent.play(min(left, self._settings.plans_per_update))
            candidates = [self._space.params(plan) for plan in self._played.plans]
            missing = self._unknown(candidates, trials)
            if missing:
                return missing
            self._learn(self._played, [trials[tuple(self._space.vector(params))] for params in candidates], finished)
        return None

    def _begin(self, columns: Sequence[Finished]) -> None:
        self._agent = Agent(self._space, self._settings, self._seed)
        self._columns = columns
        self._played: Episodes | None = None
        self._values: list[float] = []  # of all episodes learnt from: not yet averaged or scaled
        self._last = max((trial.number for trial in columns), default=-1)  # trial that was known by the last update
        self._learnt: list[Finished] = []  # all trials up to that one
        self._familiar = 0  # updates in a row without a new plan

    def _known_by_then(self, finished: Sequence[Finished]) -> list[Finished]:
        return [trial for trial in finished if trial.number <= self._last]

    def _unknown(self, candidates: Sequence[Params], trials: dict[tuple[int, ...], Finished]) -> list[Params]:
        """The distinct candidates without a trial."""
        distinct = {tuple(self._space.vector(params)): params for params in candidates}
        return [params for key, params in distinct.items() if key not in trials]

    def _learn(self, played: Episodes, trials: Sequence[Finished], finished: Sequence[Finished]) -> None:
        newest = max(trial.number for trial in trials)
        self._familiar = 0 if newest > self._last else self._familiar + 1
        self._last = max(self._last, newest)
        self._learnt = self._known_by_then(finished)
        is_paired = self._settings.reward == "paired"
        values = paired_rewards(self._learnt, self._columns, self._value) if is_paired else self._value(self._learnt)
        value_of = {trial.number: value for trial, value in zip(self._learnt, values, strict=True)}
        self._values += [value_of[trial.number] for trial in trials]
        rewards = self._values if is_paired else dynamic_average(self._values, self._settings)
        scale = max(float(np.std(rewards)), _LEAST_SCALE)
        self._agent.learn(played, ((np.array(rewards[-len(trials) :]) - np.mean(rewards)) / scale).tolist())
        self._played = None
