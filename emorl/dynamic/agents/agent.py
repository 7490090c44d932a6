"""The agent of RLAE (arXiv 2506.00439): a logistic-normal policy over ensemble weights.

An action is z ~ N(mu(s), sigma^2) in R^K, the weights are softmax(z / temperature), and evaluation takes z = mu(s). Its density
is taken on z, so no Jacobian is needed. `ppo` has one actor for all weights; `mappo` has one for each model, which sees its
own signals and hidden state and the mean of the others' signals, and both have one critic that sees everything.

Departures from the paper's released code, whose weights are the softmax itself, without sampling or critic: see the reference
in `dynamic/agents/ppo.py`. Its encoder reads the question only; ours also what was written. And the models' own hidden
states, which have read all of it, are seen by default, so that small ensembles need no encoder.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from emorl.config.dynamic import AgentConfig, AgentKind
from emorl.dynamic.agents.observation import MODEL_FEATURES, SHARED_FEATURES, Situation
from emorl.dynamic.agents.text_encoder import TextEncoder
from emorl.policies.conversation import prompt_text


class SpanAgent(nn.Module):
    """Actor, critic and, where it has one, encoder; a `WeightChooser` that chooses the mean action.

    Same seed, same parameters. `sample` is for training.
    """

    def __init__(
        self, kind: AgentKind, models: int, states: int, config: AgentConfig, first_deviation: float = 1.0, seed: int = 0
    ) -> None:
        """`states` is H of the engine's hidden states, used if `config.states`."""
        super().__init__()
        self.kind, self.models, self.config = kind, models, config
        self.encoder = None if config.encoder is None else TextEncoder(config.encoder, config.context, config.lora, seed)
        text = 0 if self.encoder is None else 2 * self.encoder.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.features = Features(self.encoder, text, states if config.states else 0)
            shared, own = SHARED_FEATURES + text, MODEL_FEATURES + (states if config.states else 0)
            self.actor = (_JointActor if kind == "ppo" else _OwnActors)(shared, own, models, config.hidden)
            self.critic = _mlp(shared + models * own, config.hidden, 1)
        self.log_deviation = nn.Parameter(torch.full((models,), float(first_deviation)).log())
        self._read: dict[str, Tensor] = {}  # prompts of the batch in progress, by what they say

    def observe(self, situation: Situation) -> dict[str, Tensor]:
        """What the actor and critic take, of A open texts; on the CPU."""
        shared, models = situation.features()
        found = {"shared": shared, "models": models}
        if self.config.states:
            found["states"] = situation.writing.states[situation.open_]
        if self.encoder is not None:
            prompts = [prompt_text(situation.prompts[row]) for row in situation.open_.tolist()]
            recent = self.encoder.tokenize(situation.texts, keep_end=True)
            if self.encoder.is_tuned:
                found["prompt_ids"], found["prompt_mask"] = self.encoder.tokenize(prompts, keep_end=True)
                found["recent_ids"], found["recent_mask"] = recent
            else:
                found["text"] = torch.cat([self._prompts_read(prompts), self.encoder(*recent).cpu()], -1)
        return found

    def _prompts_read(self, prompts: list[str]) -> Tensor:
        """Features (A, E), each prompt read once per batch."""
        assert self.encoder is not None
        missing = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self._read))
        if missing:
            known = {prompt: self._read[prompt] for prompt in prompts if prompt in self._read}
            fresh = self.encoder(*self.encoder.tokenize(missing, keep_end=True)).cpu()
            self._read = known | dict(zip(missing, fresh, strict=True))
        return torch.stack([self._read[prompt] for prompt in prompts])

    def policy(self, *observation: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (A, K) of the action, for the values of an observation in its order of keys."""
        shared, models = self.features(*observation)
        mean = self.actor(shared, models)
        return mean, self.log_deviation.exp().expand_as(mean)

    def value(self, *observation: Tensor) -> Tensor:
        """What the critic expects, (A, 1)."""
        shared, models = self.features(*observation)
        return self.critic(torch.cat([shared, models.flatten(-2)], -1))

    @property
    def keys(self) -> list[str]:
        """Of an observation, in the order that `policy` and `value` take."""
        keys = ["shared", "models", *(["states"] if self.config.states else [])]
        if self.encoder is None:
            return keys
        return [*keys, *(["prompt_ids", "prompt_mask", "recent_ids", "recent_mask"] if self.encoder.is_tuned else ["text"])]

    @torch.no_grad()
    def __call__(self, situation: Situation) -> Tensor:  # type: ignore[override]
        """As `WeightChooser.__call__`: the weights of the mean action."""
        mean, _ = self.policy(*self._values(self.observe(situation)))
        return self.weights(mean.cpu())

    @torch.no_grad()
    def sample(self, situation: Situation, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Weights (A, K) of the action mean + deviation * noise (A, K), and the decision: observation, `action` and
        `log_probability` of each model's part of it, both (A, K)."""
        observation = self.observe(situation)
        mean, deviation = (each.cpu() for each in self.policy(*self._values(observation)))
        action = mean + deviation * noise
        log_probability = torch.distributions.Normal(mean, deviation).log_prob(action)
        return self.weights(action), {**observation, "action": action, "log_probability": log_probability}

    def weights(self, action: Tensor) -> Tensor:
        """Weights (A, K) of actions (A, K)."""
        weights = torch.softmax(action / self.config.temperature, -1)
        least = weights.amax(-1, keepdim=True).clamp(max=self.config.least_weight)
        weights = torch.where(weights < least, 0.0, weights)
        return weights / weights.sum(-1, keepdim=True)

    def trained_state(self) -> Mapping[str, Tensor]:
        """The parameters that learn; the encoder's own are not among them."""
        learning = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value.cpu().contiguous() for name, value in self.state_dict().items() if name in learning}

    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `trained_state` gave.

        Raises:
            ValueError: the state of another agent.
        """
        if set(state) != set(self.trained_state()):
            raise ValueError("the saved agent has other parameters than this one; it was trained with other settings")
        self.load_state_dict(dict(state), strict=False)

    @property
    def device(self) -> torch.device:
        return self.log_deviation.device

    def _values(self, observation: Mapping[str, Tensor]) -> list[Tensor]:
        return [observation[key].to(self.device) for key in self.keys]


class Features(nn.Module):
    """An observation as shared features (A, D) and features of each model (A, K, F)."""

    def __init__(self, encoder: TextEncoder | None, text: int, states: int) -> None:
        super().__init__()
        self._encoder = [encoder]  # in a list: the agent owns it
        self.text_norm = nn.LayerNorm(text) if text else None
        self.state_norm = nn.LayerNorm(states, elementwise_affine=False) if states else None

    def forward(self, shared: Tensor, models: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        """`others` are the models' hidden states (A, K, H), if they are seen; then the features (A, 2 E) of a frozen encoder,
        or ids and masks of prompt and recent text for one that learns."""
        if self.state_norm is not None:
            models, others = torch.cat([models, self.state_norm(others[0])], -1), others[1:]
        if self.text_norm is None:
            return shared, models
        [encoder] = self._encoder
        assert encoder is not None
        read = others[0] if len(others) == 1 else torch.cat([encoder(*others[:2]), encoder(*others[2:])], -1)
        return torch.cat([shared, self.text_norm(read.to(shared.device))], -1), models


class _JointActor(nn.Module):
    """One network for all weights."""

    def __init__(self, shared: int, own: int, models: int, hidden: int) -> None:
        super().__init__()
        self.network = _mlp(shared + models * own, hidden, models, last_gain=0.01)

    def forward(self, shared: Tensor, models: Tensor) -> Tensor:
        """Means (A, K)."""
        return self.network(torch.cat([shared, models.flatten(-2)], -1))


class _OwnActors(nn.Module):
    """A network for each model; none shares parameters with another."""

    def __init__(self, shared: int, own: int, models: int, hidden: int) -> None:
        super().__init__()
        inputs = shared + own + MODEL_FEATURES
        self.networks = nn.ModuleList(_mlp(inputs, hidden, 1, last_gain=0.01) for _ in range(models))

    def forward(self, shared: Tensor, models: Tensor) -> Tensor:
        """Means (A, K): each from its model's own features, and the mean of the others' without their hidden states."""
        signals = models[..., :MODEL_FEATURES]
        others = (signals.sum(-2, keepdim=True) - signals) / max(1, models.shape[-2] - 1)  # (A, K, F)
        own = torch.cat([models, others], -1)
        return torch.cat([network(torch.cat([shared, own[..., i, :]], -1)) for i, network in enumerate(self.networks)], -1)


def _mlp(inputs: int, hidden: int, outputs: int, last_gain: float = 1.0) -> nn.Sequential:
    """Two tanh layers, orthogonal at first; a small last gain makes the first weights nearly equal."""
    layers = [nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)]
    for layer, gain in zip(layers, (2**0.5, 2**0.5, last_gain), strict=True):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
