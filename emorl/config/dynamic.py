"""The `dynamic` block of an experiment (RLAE): frozen dataclasses, free of torch."""

from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_strict = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

AgentKind = Literal["ppo", "mappo"]


@dataclass(frozen=True, config=_strict)
class AgentConfig:
    states: bool = True
    """the agent sees every model's last hidden state, which costs nothing; without, only entropy, top probability and
    disagreement of their next tokens, and how far the text is"""
    encoder: str | None = None
    """hub id or folder of a transformers encoder that reads prompt and recent text besides (paper:
    microsoft/deberta-v3-large)"""
    lora: dict[str, Any] | None = None
    """straight to peft.LoraConfig: the encoder is tuned too; without, it stays as it is"""
    context: int = Field(default=128, ge=8)
    """last tokens of the prompt, which is read once, and last tokens of the text so far that the encoder reads"""
    hidden: int = Field(default=64, ge=4)
    """width of the two layers of actor and critic"""
    temperature: float = Field(default=1.0, gt=0)
    """weights = softmax(action / temperature)"""
    least_weight: float = Field(default=0.02, ge=0, lt=0.5)
    """smaller weights become 0, so that their model need not run; the largest never does"""

    def __post_init__(self) -> None:
        if self.lora is not None and self.encoder is None:
            raise ValueError("agent.lora tunes an encoder; name one in agent.encoder, or leave lora out")


@dataclass(frozen=True, config=_strict)
class PPOConfig:
    updates: int = Field(default=200, ge=1)
    """PPO updates; each learns from `prompts` new texts"""
    prompts: int = Field(default=64, ge=2)
    """training prompts answered per update"""
    samples: int = Field(default=1, ge=1)
    """texts per prompt; `baseline: group` needs at least 2"""
    epochs: int = Field(default=4, ge=1)
    """passes over an update's decisions"""
    minibatch: int = Field(default=256, ge=2)
    """decisions per gradient step, at least"""
    learning_rate: float = Field(default=1e-3, gt=0)
    """of actor and critic"""
    encoder_learning_rate: float = Field(default=1e-5, gt=0)
    """of the encoder's adapter"""
    clip: float = Field(default=0.2, gt=0)
    """of the probability ratio"""
    entropy: float = Field(default=0.005, ge=0)
    """weight of the entropy bonus"""
    gradient_norm: float = Field(default=0.5, gt=0)
    """where gradients are clipped"""
    target_kl: float = Field(default=0.03, gt=0)
    """an update ends when it has moved the policy this far"""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """of generalised advantage estimation; gamma is 1, the reward comes at the end"""
    first_deviation: float = Field(default=1.0, gt=0)
    """standard deviation of the actions at first"""
    baseline: Literal["fixed", "group", "none"] = "fixed"
    """subtracted from each text's reward: what the best fixed weights earn on the same prompt (paired), or the mean of the
    prompt's own samples"""
    checkpoint: int = Field(default=10, ge=1)
    """updates between checkpoints, each with a validation; a kill loses at most these"""


@dataclass(frozen=True, config=_strict, kw_only=True)
class DynamicConfig:
    models: dict[str, str] = Field(default_factory=dict)
    """name -> hub id or folder: different models with tokenizers of their own write together, by the union of their
    vocabularies; without any, the experiment's trained policies do, by hidden states"""
    vocabulary: Literal["top_k", "full"] = "top_k"
    """of different models: the union of each one's most probable tokens (UniTE), or of all tokens (GaC)"""
    top_k: int = Field(default=10, ge=1)
    """most probable tokens of each model"""
    agents: list[AgentKind] = Field(default_factory=lambda: ["ppo", "mappo"], min_length=1)
    """which agents are trained: ppo has one network for all weights, mappo one for each model with a central critic"""
    span: int | Literal["turn"] = 8
    """tokens between two decisions (paper: 8); turn: one decision for each answer"""
    spans: list[int] = Field(default_factory=lambda: [1, 4, 8, 16, 32])
    """span lengths at which the best agent is compared"""
    turns: Literal["last", "all"] = "last"
    """of a conversation: only its last user turn is answered, or every one, with what was answered before as history; each
    answer is rewarded"""
    batch: int = Field(default=64, ge=1)
    """texts written together"""
    fixed_step: float = Field(default=0.25, gt=0, le=1)
    """distance of the fixed weights among which the best rival is searched"""
    agent: AgentConfig = Field(default_factory=AgentConfig)
    """what decides"""
    ppo: PPOConfig = Field(default_factory=PPOConfig)
    """how it learns"""

    def __post_init__(self) -> None:
        if isinstance(self.span, int) and self.span < 1:
            raise ValueError(f"span: expected at least 1 token or 'turn', got {self.span}")
        if any(span < 1 for span in self.spans):
            raise ValueError(f"spans: expected at least 1 token each, got {self.spans}")
        if len(set(self.spans)) < len(self.spans):
            raise ValueError("spans: each of them once")
        if len(self.models) == 1:
            raise ValueError("models: name at least two, or none for the trained policies")
        if len(set(self.agents)) < len(self.agents):
            raise ValueError("agents: each of them once")
        if self.ppo.baseline == "group" and self.ppo.samples < 2:
            raise ValueError("ppo.baseline: group needs ppo.samples of at least 2")
