"""The `fuse` block of an experiment, and the file of `emorl fuse` for whole checkpoints: frozen dataclasses, free of torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from emorl.config import nearest
from emorl.config.yaml import apply_overrides, parse, read_yaml

_strict = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True, config=_strict, kw_only=True)
class FuseConfig:
    # described by Field, since those who inherit show no docstrings of these
    method: str = Field(
        default="linear",
        description="linear, task_arithmetic, slerp, ties, dare_linear, dare_ties, model_stock or keep (one model as it is)",
    )
    weights: dict[str, float] = Field(
        default_factory=dict, description="of the models, by name; all equal by default, else what is not named counts 0"
    )
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="of the method: normalize (linear, task_arithmetic, ties, dare_ties), scale (task_arithmetic, ties, dare), "
        "density (ties: 0.2; dare: 0.5), space (slerp: weights, task_vectors), trim (ties: tensor, or global, its authors')",
    )


@dataclass(frozen=True, config=_strict)
class QLearningConfig:
    alpha: float = Field(default=0.3, gt=0, le=1)
    """learning rate of the Q-table"""
    gamma: float = Field(default=0.9, ge=0, lt=1)
    """discount of later gains"""
    epsilon_start: float = Field(default=1.0, ge=0, le=1)
    """share of random moves at first"""
    epsilon_end: float = Field(default=0.05, ge=0, le=1)
    """and at last"""
    exploration: float = Field(default=0.6, gt=0, le=1)
    """share of the trials over which it falls"""
    learning_rate: Literal["scale", "step"] = "scale"
    """what the paper's learning-rate action turns: the scale of the method, or the step of the weights (1, 2 or 4)"""


@dataclass(frozen=True, config=_strict, kw_only=True)
class StrataConfig:
    column: str
    """of the data: each prompt's stratum, such as its subject or topic"""
    weights: Literal["share", "equal"] | dict[str, float] = "share"
    """of the strata, fixed: their shares of the prompts, all equal, or by name"""
    anchor: float = Field(default=0.2, gt=0, lt=1)
    """share of every stratum's validation prompts that all candidates answer"""
    adaptive: float = Field(default=0.5, gt=0, lt=1)
    """share of which the search uses more or fewer; the rest is the holdout, which only what was found answers"""
    total: int | None = Field(default=None, ge=1)
    """adaptive prompts that a candidate answers; half of them by default"""
    floor: int = Field(default=1, ge=1)
    """least of them of every stratum"""
    by: Literal["deviation", "weakness"] = "deviation"
    """where prompts go: to strata whose scores vary (Neyman), or are low"""
    every: int = Field(default=10, ge=1)
    """candidates between moves"""


@dataclass(frozen=True, config=_strict, kw_only=True)
class PolicyFuseConfig(FuseConfig):
    rank: int | None = Field(default=None, ge=1)
    """of the fused adapter, at most. By default weighted sums (linear, slerp, model_stock) keep everything; ties and dare,
    whose results have full rank, are cut to the sum of the policies' ranks: the card beside them says what share was kept"""
    energy: float | None = Field(default=None, gt=0, le=1)
    """instead: the share of every module's squared norm that is kept"""
    proposer: str | None = None
    """searches on the validation prompts: weights, method and scale by q_learning (RL-Fusion), settings_descent (one setting
    at a time) or an Optuna sampler (tpe, gp, cma_es, qmc, random, nsga2); the policy or merge that counts in each layer by
    reinforced_merging (RMM; extra `rl`) or coordinate_descent. By default method, weights and settings are used as given"""
    trials: int = Field(default=60, ge=1)
    """candidates the search evaluates; a finished search goes on when it is run again with more"""
    methods: list[str] = Field(default_factory=lambda: ["slerp", "ties"], min_length=1)
    """that the search switches between (slerp and ties, the paper's); for layers, the merges beside the policies"""
    scales: list[Annotated[float, Field(gt=0)]] = Field(default_factory=lambda: [0.5, 1.0, 2.0], min_length=1)
    """that it tries, for methods that have a scale (0.5, 1 and 2)"""
    step: float = Field(default=0.05, gt=0, le=0.5)
    """of the weights (paper: 0.05)"""
    q_learning: QLearningConfig = Field(default_factory=QLearningConfig)
    """of q_learning"""
    strata: StrataConfig | None = None
    """adjusts the evaluation set to the search's results, with estimates that stay unbiased; by default every candidate answers
    all validation prompts"""

    def __post_init__(self) -> None:
        _check_weights(self.weights)
        if self.rank is not None and self.energy is not None:
            raise ValueError("give rank or energy, not both")
        if abs(1 / self.step - round(1 / self.step)) > 1e-9:
            raise ValueError(f"step must divide 1 into whole steps, such as 0.05 or 0.1; got {self.step}")


@dataclass(frozen=True, config=_strict, kw_only=True)
class CheckpointsFile(FuseConfig):
    output: Path
    """folder of the fused model; must not exist yet"""
    models: dict[str, Path] = Field(min_length=1)
    """name -> folder of a transformers checkpoint in safetensors; all of one architecture"""
    base: Path | None = None
    """folder of the model they were trained from: methods on differences need it; also gives config and tokenizer"""
    keep: dict[str, str] = Field(default_factory=dict)
    """part of a tensor's name -> model it is taken from as it is, such as {classifier: topics}"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of the result; each tensor's own by default. Sums are in float32 whatever it is"""
    seed: int = 0
    """of DARE's random entries"""

    def __post_init__(self) -> None:
        _check_weights(self.weights)
        for what, names in (("weights", self.weights), ("keep", self.keep.values())):
            unknown = sorted(set(names) - set(self.models))
            if unknown:
                raise ValueError(f"{what} names {unknown[0]!r}; {nearest(unknown[0], self.models)}")

    def weight_of(self, name: str) -> float:
        """Weights that are not given are 0; without any, all are equal."""
        return self.weights.get(name, 0.0) if self.weights else 1.0 / len(self.models)


def _check_weights(weights: dict[str, float]) -> None:
    if weights and not any(weights.values()):
        raise ValueError(f"weights: one of them at least must not be 0, got {weights}")


def is_experiment(content: dict[str, Any]) -> bool:
    """Whether a YAML mapping is an experiment's, whose policies are to be fused."""
    return "objectives" in content


def is_checkpoints(content: dict[str, Any]) -> bool:
    """Whether a YAML mapping says which whole checkpoints to fuse, ours or mergekit's."""
    return not is_experiment(content) and ("models" in content or is_mergekit(content))


def is_mergekit(content: dict[str, Any]) -> bool:
    """Whether a YAML mapping is mergekit's."""
    return "merge_method" in content


def load_checkpoints_file(path: Path, overrides: Sequence[str] = ()) -> CheckpointsFile | dict[str, Any]:
    """The file of `emorl fuse` with overrides applied; mergekit's as the mapping it is, with `output` added."""
    content = apply_overrides(read_yaml(path), overrides)
    return content if is_mergekit(content) else parse(CheckpointsFile, content, str(path))
