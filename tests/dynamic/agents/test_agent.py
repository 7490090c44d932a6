"""What agents see: hidden states, an encoder's reading of prompt and text, and what a router makes of it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from emorl.config import UserError
from emorl.config.dynamic import AgentConfig, PPOConfig
from emorl.dynamic.agents.agent import SpanAgent
from emorl.dynamic.agents.observation import FixedWeights, Situation
from emorl.dynamic.agents.text_encoder import TextEncoder
from emorl.dynamic.engines.engine import Decoding
from emorl.dynamic.rollout import Sampler, _questions, write
from emorl.dynamic.router import features_of, fit_router
from tests.dynamic.toy import ToyEngine

ENGINE = ToyEngine()
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]}


@pytest.fixture(scope="module")
def encoder(save_word_encoder: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_word_encoder(tmp_path_factory.mktemp("encoder"), ["0", "1", "2", "a", "b", "c", "ab", "abc"])


def situation(prompts: list[str], spans: int = 0) -> Situation:
    writing = ENGINE.begin(prompts, Decoding(4))
    for _ in range(spans):
        writing.write(torch.eye(3)[[0] * len(prompts)], 1)
    return Situation(
        writing, prompts, torch.arange(len(prompts)), torch.arange(len(prompts)), torch.zeros(len(prompts), 3), spans, 0, 4
    )


def test_an_encoder_reads_what_stands_in_its_context(encoder: str) -> None:
    reader = TextEncoder(encoder, context=8)
    alone = reader(*reader.tokenize(["a b"], keep_end=True))
    together = reader(*reader.tokenize(["a b", "c", "a a a a b"], keep_end=True))
    torch.testing.assert_close(together[:1], alone)
    assert not torch.allclose(together[0], together[1])
    ids, _ = reader.tokenize(["a b c " * 10 + "2"], keep_end=True)
    assert ids.shape == (1, 8)
    assert reader.tokenizer.convert_tokens_to_ids("2") in ids[0].tolist()
    ids, _ = reader.tokenize(["2 " + "a b c " * 10], keep_end=False)
    assert reader.tokenizer.convert_tokens_to_ids("2") in ids[0].tolist()


def test_the_encoders_features_tell_prompts_and_texts_apart(encoder: str) -> None:
    agent = SpanAgent("ppo", 3, 2, AgentConfig(encoder=encoder, context=16))
    seen = agent.observe(situation(["0", "1", "0"]))
    assert seen["text"].shape == (3, 2 * agent.encoder.width)  # type: ignore[union-attr]
    assert torch.equal(seen["text"][0], seen["text"][2])
    assert not torch.allclose(seen["text"][0], seen["text"][1])
    later = agent.observe(situation(["0", "1", "0"], spans=2))
    width = agent.encoder.width  # type: ignore[union-attr]
    torch.testing.assert_close(later["text"][:, :width], seen["text"][:, :width])  # the prompt is the same
    assert not torch.allclose(later["text"][:, width:], seen["text"][:, width:])


@pytest.mark.parametrize("kind", ["ppo", "mappo"])
def test_an_encoders_adapter_learns_and_is_saved_while_the_encoder_stays(kind: Any, encoder: str) -> None:
    ppo = pytest.importorskip("emorl.dynamic.agents.ppo", reason="needs the extra rl")
    agent = SpanAgent(kind, 3, 2, AgentConfig(encoder=encoder, context=16, lora=LORA, hidden=8))
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    learner = ppo.Learner(agent, PPOConfig(encoder_learning_rate=0.01, target_kl=10))
    found = write(ENGINE, ["0", "1", "2", "0"], Sampler(agent, range(4)), Decoding(2), span=1)
    learner.learn(found.decisions, {(row, 0): float(row) for row in range(4)})
    moved = {name for name, value in agent.state_dict().items() if not torch.equal(value, before[name])}
    assert any("lora_B" in name for name in moved)
    assert moved <= set(agent.trained_state())
    fresh = SpanAgent(kind, 3, 2, AgentConfig(encoder=encoder, context=16, lora=LORA, hidden=8), seed=7)
    fresh.load_state_dict(agent.trained_state(), strict=False)
    torch.testing.assert_close(fresh(situation(["0", "2"])), agent(situation(["0", "2"])))


def test_a_mappo_actor_sees_its_own_models_state_alone() -> None:
    agent = SpanAgent("mappo", 3, 4, AgentConfig(hidden=8))
    shared, models = torch.randn(1, 18), torch.randn(1, 3, 5)
    states = torch.randn(1, 3, 4)
    other = states.clone()
    other[0, 2] += torch.randn(4)
    mean, _ = agent.policy(shared, models, states)
    changed, _ = agent.policy(shared, models, other)
    assert torch.equal(mean[0, :2], changed[0, :2])
    assert not torch.equal(mean[0, 2], changed[0, 2])
    assert not torch.equal(agent.value(shared, models, states), agent.value(shared, models, other))  # the critic is central


def test_a_missing_encoder_is_one_line() -> None:
    with pytest.raises(UserError, match=r"dynamic\.agent\.encoder 'no/such'"):
        TextEncoder("no/such", 16)


def test_a_router_gives_each_prompt_its_model_for_the_whole_text() -> None:
    """The right model of the first span stays right with a router, and it is known from the signals."""
    agent = SpanAgent("ppo", 3, 2, AgentConfig(states=False))
    prompts = [str(digit % 3) for digit in range(12)]
    features = features_of(agent, ENGINE, prompts, Decoding(2), "last", batch=5)
    values = np.eye(3)[[int(prompt) for prompt in prompts]]
    router = fit_router(agent, features, values)
    found = write(ENGINE, ["2", "0", "1"], router, Decoding(2), span=1)
    assert [answer.weights for answer in found.answers] == [[[0, 0, 1]] * 2, [[1, 0, 0]] * 2, [[0, 1, 0]] * 2]


def test_weights_per_text_and_per_turn() -> None:
    dialogue = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "1"}]
    found = write(ENGINE, [dialogue], FixedWeights(torch.tensor([[0, 1.0, 0]])), Decoding(3), span="turn", turns="all")
    assert [(answer.turn, answer.weights) for answer in found.answers] == [(0, [[0, 1, 0]] * 3), (1, [[0, 1, 0]] * 3)]
    last = write(ENGINE, [dialogue], FixedWeights(torch.eye(3)[0]), Decoding(3), span=1)
    assert [answer.prompt for answer in last.answers] == [dialogue]


def test_fixed_weights_stay_with_their_dialogue_where_dialogues_differ_in_length() -> None:
    """Prompt 0 has one turn, prompt 1 two: in the second turn prompt 1 is the only text."""
    turns = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "1"}]
    own = FixedWeights(torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]))
    found = write(ENGINE, [turns[:1], turns], own, Decoding(1), span=1, turns="all")
    assert [(answer.row, answer.turn, answer.weights) for answer in found.answers] == [
        (0, 0, [[1, 0, 0]]),
        (1, 0, [[0, 0, 1]]),
        (1, 1, [[0, 0, 1]]),
    ]


def test_what_is_asked_at_each_turn() -> None:
    user, answer, system = ({"role": role, "content": role} for role in ("user", "assistant", "system"))
    assert _questions([user, answer, system, user], "all") == [[user], [system, user]]
    assert _questions([user, system, answer, user], "all") == [[user, system], [user]]
    assert _questions([system, user, answer, user, answer], "all") == [[system, user], [user]]
    assert _questions([user, user], "all") == [[user], [user]]
    assert _questions([answer, user], "all") == [[user]]
