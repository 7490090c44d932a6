"""Learning to set weights: it learns where it is known what is best, texts do not share rewards, and a run can be repeated."""

import dataclasses
from typing import Any

import pytest
import torch

from emorl.config.dynamic import AgentConfig, PPOConfig
from emorl.dynamic.agents.agent import SpanAgent
from emorl.dynamic.agents.observation import FixedWeights
from emorl.dynamic.engines.engine import Decoding
from emorl.dynamic.rollout import Sampler, write
from tests.dynamic.toy import ToyEngine

ppo = pytest.importorskip("emorl.dynamic.agents.ppo", reason="needs the extra rl")
ENGINE, SPANS = ToyEngine(), 2
PROMPTS = [str(digit % 3) for digit in range(48)]
CONFIG = PPOConfig(learning_rate=1e-3, entropy=0.01, target_kl=0.1)


def success(chooser: Any) -> float:
    """Share of prompts with the right model in every span."""
    found = write(ENGINE, ["0", "1", "2"], chooser, Decoding(SPANS), span=1)
    return sum(one.text == ENGINE.right(str(one.row), SPANS) for one in found.answers) / 3


def trained(kind: Any, seed: int, updates: int, learner: Any = None, first: int = 0) -> tuple[SpanAgent, Any]:
    agent = SpanAgent(kind, 3, 2, AgentConfig(hidden=32), first_deviation=2.0, seed=seed) if learner is None else learner._agent
    learner = learner or ppo.Learner(agent, CONFIG, seed)
    for update in range(first, first + updates):
        sampler = Sampler(agent, [10_000 * seed + 100 * update + row for row in range(len(PROMPTS))])
        found = write(ENGINE, PROMPTS, sampler, Decoding(SPANS), span=1)
        rewards = {(one.row, 0): float(one.text == ENGINE.right(PROMPTS[one.row], SPANS)) for one in found.answers}
        learner.learn(found.decisions, rewards)
    return agent, learner


@pytest.mark.parametrize("kind", ["ppo", "mappo"])
def test_agents_learn_weights_that_depend_on_prompt_and_span(kind: str) -> None:
    every_fixed = torch.cartesian_prod(*[torch.linspace(0, 1, 5)] * 3)[1:]
    assert max(success(FixedWeights(weights / weights.sum())) for weights in every_fixed) == 0  # the right model changes
    agent, _ = trained(kind, seed=0, updates=100)
    assert success(agent) >= 2 / 3


@pytest.mark.parametrize("kind", ["ppo", "mappo"])
def test_the_gradient_moves_weight_to_the_model_that_earns_the_reward(kind: Any) -> None:
    agent = SpanAgent(kind, 3, 2, AgentConfig(hidden=32))
    before = write(ENGINE, PROMPTS[:3], agent, Decoding(SPANS), span=1)
    learner = ppo.Learner(agent, dataclasses.replace(CONFIG, target_kl=10.0, epochs=8))
    sampler = Sampler(agent, range(48))
    found = write(ENGINE, PROMPTS, sampler, Decoding(SPANS), span=1)
    learner.learn(found.decisions, {(one.row, 0): float(one.text.count("b")) for one in found.answers})
    after = write(ENGINE, PROMPTS[:3], agent, Decoding(SPANS), span=1)
    for old, new in zip(before.answers, after.answers, strict=True):
        for first, second in zip(old.weights, new.weights, strict=True):
            assert second[1] > first[1] + 0.01
            assert second[1] == max(second)


@pytest.mark.parametrize("kind", ["ppo", "mappo"])
def test_a_reward_reaches_the_decisions_of_its_own_text_alone(kind: Any) -> None:
    agent = SpanAgent(kind, 3, 2, AgentConfig(hidden=32))
    for parameter in agent.critic.parameters():
        torch.nn.init.zeros_(parameter)
    learner = ppo.Learner(agent, dataclasses.replace(CONFIG, gae_lambda=1.0))
    found = write(ENGINE, PROMPTS[:4], Sampler(agent, range(4)), Decoding(SPANS), span=1)
    data = learner._with_advantages(found.decisions, {(0, 0): 1.0, (1, 0): 0.0, (2, 0): -2.0, (3, 0): 0.5})
    expected = torch.tensor([1.0, 0.0, -2.0, 0.5]).repeat_interleave(SPANS)
    advantage = data["advantage"]
    assert advantage.shape == ((4 * SPANS, 1) if kind == "ppo" else (4 * SPANS, 3, 1))
    torch.testing.assert_close(advantage.flatten(1), expected[:, None].expand(-1, advantage[0].numel()))


def test_each_answer_of_a_dialogue_is_rewarded_and_earlier_decisions_see_later_rewards() -> None:
    agent = SpanAgent("ppo", 3, 2, AgentConfig(hidden=32))
    for parameter in agent.critic.parameters():
        torch.nn.init.zeros_(parameter)
    learner = ppo.Learner(agent, dataclasses.replace(CONFIG, gae_lambda=1.0))
    dialogue = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "?"}, {"role": "user", "content": "1"}]
    found = write(ENGINE, [dialogue, dialogue[:1]], Sampler(agent, range(2)), Decoding(2), span=1, turns="all")
    assert [(one.row, one.turn) for one in found.answers] == [(0, 0), (0, 1), (1, 0)]
    said = found.answers[0].text
    assert found.answers[1].prompt == [dialogue[0], {"role": "assistant", "content": said}, dialogue[2]]
    data = learner._with_advantages(found.decisions, {(0, 0): 1.0, (0, 1): 10.0, (1, 0): 3.0})
    assert data["advantage"].flatten().tolist() == [11, 11, 10, 10, 3, 3]


@pytest.mark.parametrize("kind", ["ppo", "mappo"])
def test_the_same_seed_gives_the_same_run_and_a_saved_one_continues_exactly(kind: Any) -> None:
    whole, _ = trained(kind, seed=1, updates=4)
    _, half = trained(kind, seed=1, updates=2)
    resumed = ppo.Learner(SpanAgent(kind, 3, 2, AgentConfig(hidden=32), first_deviation=2.0, seed=9), CONFIG, seed=9)
    resumed.load_state(half.state())
    again, _ = trained(kind, seed=1, updates=2, learner=resumed, first=2)
    for first, second in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)


def test_noise_belongs_to_a_text_whatever_its_batch() -> None:
    agent = SpanAgent("ppo", 3, 2, AgentConfig(hidden=32))
    together = write(ENGINE, ["0", "1", "2"], Sampler(agent, [5, 6, 7]), Decoding(SPANS), span=1)
    alone = write(ENGINE, ["2"], Sampler(agent, [7]), Decoding(SPANS), span=1)
    torch.testing.assert_close(torch.tensor(alone.answers[0].weights), torch.tensor(together.answers[2].weights))


def test_small_weights_become_zero() -> None:
    agent = SpanAgent("ppo", 3, 2, AgentConfig(least_weight=0.1))
    weights = agent.weights(torch.tensor([[3.0, 2.5, -4.0], [0.0, 0.0, 0.0]]))
    assert weights[0, 2] == 0
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    torch.testing.assert_close(weights[1], torch.full((3,), 1 / 3))


def test_the_largest_weight_is_never_cut() -> None:
    agent = SpanAgent("ppo", 3, 2, AgentConfig(least_weight=0.4))
    torch.testing.assert_close(agent.weights(torch.zeros(1, 3)), torch.full((1, 3), 1 / 3))


@pytest.mark.parametrize("minibatch", [2, 3, 9])
def test_no_minibatch_is_too_small_to_be_normalised(minibatch: int) -> None:
    agent = SpanAgent("mappo", 3, 2, AgentConfig(hidden=8))
    learner = ppo.Learner(agent, dataclasses.replace(CONFIG, minibatch=minibatch, target_kl=100.0))
    found = write(ENGINE, PROMPTS[:5], Sampler(agent, range(5)), Decoding(2), span=1)
    learner.learn(found.decisions, {(row, 0): float(row) for row in range(5)})
    assert all(bool(parameter.isfinite().all()) for parameter in agent.parameters())
