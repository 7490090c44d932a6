"""Learning to set the weights: PPO and MAPPO with TorchRL's losses and advantage estimation, on decisions of our own rollouts.

What the released code of RLAE calls PPO has no sampling, no log-probabilities and no critic: its gradient moves every correct
answer's weights towards uniform whichever model helped, and its MAPPO multiplies weights and rewards of different texts. Here a
text's reward (N decisions, one reward at the end of each answer) reaches its own decisions only.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict  # pyright: ignore[reportAttributeAccessIssue]  # not in its type stub
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import IndependentNormal, ProbabilisticActor
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.multiagent import MAPPOLoss
from torchrl.objectives.value import GAE, MultiAgentGAE

from emorl.config import UserError
from emorl.config.dynamic import PPOConfig
from emorl.dynamic.agents.agent import SpanAgent
from emorl.dynamic.rollout import Decisions

_LEAST_ROWS = 64  # decisions that the critic values at once, where minibatches are smaller


class Learner:
    """Improves an agent from batches of decisions and rewards; `state` and `load_state` continue it exactly."""

    def __init__(self, agent: SpanAgent, config: PPOConfig, seed: int = 0) -> None:
        self._agent, self._config = agent, config
        self._generator = torch.Generator().manual_seed(seed)
        shared = {
            "clip_epsilon": config.clip,
            "entropy_coeff": config.entropy,
            "critic_coeff": 0.5,
            "loss_critic_type": "l2",
            "normalize_advantage": True,
        }
        prefix = "agents" if agent.kind == "mappo" else None
        policy, critic = _Policy(agent, prefix is not None), _Critic(agent, prefix is not None)
        loc, scale, action, value = (_key(prefix, name) for name in ("loc", "scale", "action", "state_value"))
        actor = ProbabilisticActor(  # for the loss only: our rollouts sample by themselves
            TensorDictModule(policy, in_keys=agent.keys, out_keys=[loc, scale]),
            in_keys={"loc": loc, "scale": scale},
            out_keys=[action],
            distribution_class=IndependentNormal,
        )
        valued = TensorDictModule(critic, in_keys=agent.keys, out_keys=[value])
        if prefix is None:
            self._loss: Any = ClipPPOLoss(actor, valued, **shared)
            self._advantage: Any = GAE(gamma=1.0, lmbda=config.gae_lambda, value_network=None)
        else:
            self._loss = MAPPOLoss(actor, valued, **shared)
            self._loss.set_keys(value=value, action=action, sample_log_prob=(prefix, "action_log_prob"))
            self._advantage = MultiAgentGAE(gamma=1.0, lmbda=config.gae_lambda, value_network=None)
            self._advantage.set_keys(value=value)
        self._value, self._critic = value, critic
        tuned = [p for name, p in agent.named_parameters() if p.requires_grad and name.startswith("encoder.")]
        heads = [p for name, p in agent.named_parameters() if p.requires_grad and not name.startswith("encoder.")]
        self._parameters = [*heads, *tuned]
        groups = [{"params": heads, "lr": config.learning_rate}]
        if tuned:
            groups.append({"params": tuned, "lr": config.encoder_learning_rate})
        self._optimizer = torch.optim.Adam(groups)

    def learn(self, decisions: Decisions, rewards: Mapping[tuple[int, int], float]) -> dict[str, float]:
        """One update.

        Args:
            rewards: of each answer by (row, turn); it comes with the answer's last decision.

        Returns:
            Means over the update's gradient steps: objective, critic and entropy losses, kl; how many steps there were.
        """
        if len(decisions.rows) < 2:
            raise UserError("an update has a single decision; give more dynamic.ppo.prompts or a shorter dynamic.span")
        data = self._with_advantages(decisions, rewards)
        sums: dict[str, float] = {}
        steps = 0
        for _ in range(self._config.epochs):
            order = torch.randperm(len(data), generator=self._generator)
            for part in order.tensor_split(max(1, len(data) // self._config.minibatch)):  # sizes differ by 1 at most
                losses = self._loss(data[part].to(self._agent.device))
                kl = float(losses["kl_approx"])
                if not math.isfinite(kl):
                    raise UserError("the agent's loss is no number; lower dynamic.ppo.learning_rate")
                if kl > self._config.target_kl:
                    return _means(sums, steps)
                self._optimizer.zero_grad()
                (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
                nn.utils.clip_grad_norm_(self._parameters, self._config.gradient_norm)
                self._optimizer.step()
                steps += 1
                now = {name: float(losses[f"loss_{name}"].detach()) for name in ("objective", "critic", "entropy")}
                for name, value in {**now, "kl": kl}.items():
                    sums[name] = sums.get(name, 0.0) + value
        return _means(sums, steps)

    @torch.no_grad()
    def _with_advantages(self, decisions: Decisions, rewards: Mapping[tuple[int, int], float]) -> TensorDict:
        rows, turns, count = decisions.rows, decisions.turns, len(decisions.rows)
        last = torch.ones(count, 1, dtype=torch.bool)  # of its prompt: no value follows
        last[:-1, 0] = rows[1:] != rows[:-1]
        of_answer = last.clone()
        of_answer[:-1, 0] |= turns[1:] != turns[:-1]
        earned = torch.zeros(count, 1)
        for index in of_answer[:, 0].nonzero().flatten().tolist():
            earned[index] = rewards[int(rows[index]), int(turns[index])]
        data, device = self._tensordict(decisions.data), self._agent.device
        parts = data.split(max(self._config.minibatch, _LEAST_ROWS))  # an encoder cannot read all at once
        values = torch.cat([self._critic(*(part[key].to(device) for key in self._agent.keys)).cpu() for part in parts])
        following = torch.cat([values[1:], values[:1]])
        following[last[:, 0]] = 0.0
        data[self._value] = values
        data["next"] = TensorDict({"reward": earned, "done": last, "terminated": last}, batch_size=[count])
        data["next"][self._value] = following
        return self._advantage(data)

    def _tensordict(self, decision: Mapping[str, Tensor]) -> TensorDict:
        """Decisions as the loss wants them: one action of K numbers, or K agents with one number each."""
        data: dict[str, Any] = {key: decision[key] for key in self._agent.keys}
        action, log_probability = decision["action"], decision["log_probability"]  # (N, K)
        if self._agent.kind == "ppo":
            data |= {"action": action, "action_log_prob": log_probability.sum(-1)}
        else:
            of_agents = {"action": action[..., None], "action_log_prob": log_probability}
            data["agents"] = TensorDict(of_agents, batch_size=action.shape)  # type: ignore[arg-type]
        return TensorDict(data, batch_size=[len(action)])

    def state(self) -> dict[str, Any]:
        """Everything that learning depends on, for `torch.save`."""
        return {
            "agent": dict(self._agent.trained_state()),
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state()`."""
        self._agent.load_trained(state["agent"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])


class _Policy(nn.Module):
    """The agent's policy as the loss calls it; with an axis of single actions where every model has an agent of its own."""

    def __init__(self, agent: SpanAgent, by_model: bool) -> None:
        super().__init__()
        self.agent, self._by_model = agent, by_model

    def forward(self, *observation: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = self.agent.policy(*observation)
        return (mean[..., None], deviation[..., None]) if self._by_model else (mean, deviation)


class _Critic(nn.Module):
    """The central critic; where every model has an agent, all of them have its value, (N, K, 1)."""

    def __init__(self, agent: SpanAgent, by_model: bool) -> None:
        super().__init__()
        self.agent, self._by_model = agent, by_model

    def forward(self, *observation: Tensor) -> Tensor:
        value = self.agent.value(*observation)
        return value[:, None].expand(-1, self.agent.models, -1) if self._by_model else value


def _key(prefix: str | None, name: str) -> Any:
    return name if prefix is None else (prefix, name)


def _means(sums: Mapping[str, float], steps: int) -> dict[str, float]:
    return {**{name: value / max(1, steps) for name, value in sums.items()}, "steps": float(steps)}
