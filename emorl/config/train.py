"""The block `train`: how policies are trained, and the blocks in it."""

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_strict = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True, config=_strict)
class ConvergenceConfig:
    window: int = Field(default=20, ge=2)
    """validations looked back on (paper: 20)"""
    threshold: float = Field(default=0.015, ge=0)
    """stop when standard deviation / |mean| of the window falls below this (paper: 0.015); 0 never stops"""


@dataclass(frozen=True, config=_strict)
class DynaOptConfig:
    gamma: float = Field(default=0.07, gt=0, le=1)
    """Exp3's share of random choices, and its step (DynaOpt: 0.07); the reward weights move at every validation"""


@dataclass(frozen=True, config=_strict)
class CollapseConfig:
    share: float = Field(default=0.8, ge=0, le=1)
    """a policy with fewer distinct completions over prompts than this share of the base's counts as collapsed; no
    checkpoint more than half the way there is kept as best; 0 switches this off"""
    patience: int = Field(default=3, ge=1)
    """stop training after this many collapsed validations in a row"""


@dataclass(frozen=True, config=_strict)
class SamplesConfig:
    per_prompt: int = Field(default=8, ge=2)
    """answers of the base to each training prompt; all objectives score the same ones"""
    temperature: float = Field(default=1.0, gt=0)
    """of sampling"""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """sample among the tokens that have this share of probability"""
    choose: Literal["best_worst", "all"] = "best_worst"
    """pairs of a prompt's answers: the best against the worst, or all that differ enough"""
    margin: float = Field(default=0.0, ge=0)
    """how much better (in scores) the chosen answer must be than the rejected one; ties are never pairs"""
    length_ratio: float | None = Field(default=None, ge=1)
    """only pairs whose longer answer has at most so many times the words of the shorter one: then no policy learns only to be
    long; 1.2 is strict"""
    validation: float = Field(default=0.1, gt=0, lt=1)
    """share of the prompts whose pairs are not trained on: the policy's accuracy on them is reported"""
    rounds: int = Field(default=1, ge=1)
    """2: the trained policy answers the prompts itself, and goes on with pairs of these answers; and so on"""
    batch: int = Field(default=64, ge=1)
    """answers sampled at once"""
    reuse: Path | None = None
    """output of another experiment whose samples are used; of the same base, prompts, length and seed"""


Mode = Literal["ensemble", "uniform", "weighted", "gdpo", "dynaopt"]

Method = Literal["grpo", "scst", "dpo"]


@dataclass(frozen=True, config=_strict)
class TrainConfig:
    mode: Mode = "ensemble"
    """ensemble trains one policy per objective (EMORL); all others train one policy for all objectives: uniform (mean of the
    rewards), weighted (by preferences), gdpo (each reward normalised in its group, then summed), dynaopt (a bandit moves
    the reward weights)"""
    method: Method | None = None
    """grpo samples while it trains (what a decoder gets by default), scst is that for an encoder-decoder. dpo trains a decoder
    offline, on pairs of answers: pairs that people made, or answers of the base, sampled once for all objectives. An objective
    may have a `method` of its own"""
    preferences: dict[str, float] = Field(default_factory=dict)
    """objective -> weight of its reward, for mode weighted; what is not named counts 0"""
    tuning: Literal["lora", "full"] = "lora"
    """full tunes every parameter (the authors' single policies); an ensemble is made of LoRA adapters only"""
    lora: dict[str, Any] = Field(default_factory=lambda: {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"})
    """straight to peft.LoraConfig"""
    grpo: dict[str, Any] = Field(default_factory=dict)
    """straight to trl.GRPOConfig (learning_rate, max_steps, beta, num_generations, eval_steps, …); for a decoder"""
    scst: dict[str, Any] = Field(default_factory=dict)
    """straight to emorl's SCSTConfig, the same settings where both have them (and baseline); for an encoder-decoder"""
    dpo: dict[str, Any] = Field(default_factory=dict)
    """straight to trl.DPOConfig (learning_rate, max_steps, beta, loss_type, eval_steps, …)"""
    samples: SamplesConfig = Field(default_factory=SamplesConfig)
    """what method dpo makes pairs of, for objectives that bring none"""
    keep: list[float] = Field(default_factory=list)
    """shares of max_steps, such as [0.25, 0.5, 0.75, 1], at which the policy is kept beside the best one, in
    train/NAME/kept/"""
    dynaopt: DynaOptConfig = Field(default_factory=DynaOptConfig)
    """the bandit of mode dynaopt"""
    convergence: ConvergenceConfig = Field(default_factory=ConvergenceConfig)
    """when training has converged (paper's rule)"""
    collapse: CollapseConfig = Field(default_factory=CollapseConfig)
    """when a policy counts as collapsed to few sentences"""

    def __post_init__(self) -> None:
        if any(not 0 < share <= 1 for share in self.keep):
            raise ValueError(f"keep: expected shares above 0 and at most 1, such as [0.5, 1], got {self.keep}")
        if self.mode == "dynaopt" and self.method == "dpo":
            raise ValueError("mode dynaopt moves the reward weights while training samples: use method grpo or scst")
        if self.tuning == "full" and self.samples.rounds > 1:
            raise ValueError("samples.rounds: a round goes on with the adapter of the one before; tuning: full has none")
        if self.mode == "ensemble" and self.tuning == "full":
            raise ValueError("tuning: full needs a mode that trains one policy; an ensemble is made of LoRA adapters")
        if (self.mode == "weighted") != bool(self.preferences):
            raise ValueError("mode weighted and preferences go together, for example preferences={helpful: 2, polite: 1}")
