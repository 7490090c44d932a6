"""The experiment file: one frozen dataclass per block, shared by all stages.

They stand here, not beside each stage's `run`, so that a wrong experiment file fails before torch is imported.
Blocks named after another library (`lora`, `grpo`, `generation`) go straight to that library.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from emorl.config import UserError
from emorl.config.base import BaseConfig
from emorl.config.data import DataConfig
from emorl.config.dynamic import DynamicConfig
from emorl.config.fuse import PolicyFuseConfig, is_checkpoints
from emorl.config.objects import TextOrObject, short_form
from emorl.config.yaml import apply_overrides, parse, read_yaml

_strict = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True, config=_strict)
class TransformConfig:
    range: tuple[float, float] | None = None
    """lowest and highest raw score, which become 0 and 1; by default what the objective's function declares"""
    mean: float | None = None
    """instead of a range, where there is none (a reward model's logit): score = logistic((raw score - mean) / std)"""
    std: float | None = Field(default=None, gt=0)
    """goes with mean"""
    clip: tuple[float, float] | None = None
    """scores are cut to these: [0, 1] by default, [0.0001, 0.9999] with log (paper)"""
    log: bool = False
    """training maximises log(score) (paper's reward); validation, search, evaluation and report show the score itself"""

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together")
        if self.range is not None and self.mean is not None:
            raise ValueError("give either a range, or mean and std")
        if self.range is not None and self.range[0] >= self.range[1]:
            raise ValueError(f"range: expected two numbers, the lower first, got {list(self.range)}")
        if self.clip is not None and not 0 <= self.clip[0] < self.clip[1] <= 1:
            raise ValueError(f"clip: expected two numbers in [0, 1], the lower first, got {list(self.clip)}")
        if self.log and self.clip is not None and self.clip[0] == 0:
            raise ValueError("clip must begin above 0 where log is on: log(0) is no reward")


@dataclass(frozen=True, config=_strict)
class ObjectiveConfig:
    function: TextOrObject
    """registry name (classifier, likelihood, length, …), hub id of a sequence classifier, or package.module:attribute; in
    Python also a reward function or class itself"""
    options: dict[str, Any] = Field(default_factory=dict)
    """options of that function; may be written beside `function` directly (one called `transform` only here)"""
    transform: TransformConfig | None = None
    """from the function's raw score to a score in [0, 1]; without it, the range that the function declares is mapped onto
    [0, 1], and the scores of a function that declares none stay as they are"""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        """`reflection: package.module:f` (or a callable) and options written beside `function`."""
        value = value if isinstance(value, cls) else short_form("function", value)
        content = value if isinstance(value, dict) else dict(getattr(value, "kwargs", None) or {})
        options = {k: v for k, v in content.items() if k not in ("function", "options", "transform")}
        options |= content.get("options") or {}
        return {"function": content.get("function"), "options": options, "transform": content.get("transform")}


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


Mode = Literal["ensemble", "uniform", "weighted", "gdpo", "dynaopt"]


@dataclass(frozen=True, config=_strict)
class TrainConfig:
    mode: Mode = "ensemble"
    """ensemble trains one policy per objective (EMORL); all others train one policy for all objectives: uniform (mean of the
    rewards), weighted (by preferences), gdpo (each reward normalised in its group, then summed), dynaopt (a bandit moves
    the reward weights)"""
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
    dynaopt: DynaOptConfig = Field(default_factory=DynaOptConfig)
    """the bandit of mode dynaopt"""
    convergence: ConvergenceConfig = Field(default_factory=ConvergenceConfig)
    """when training has converged (paper's rule)"""
    collapse: CollapseConfig = Field(default_factory=CollapseConfig)
    """when a policy counts as collapsed to few sentences"""

    def __post_init__(self) -> None:
        if self.mode == "ensemble" and self.tuning == "full":
            raise ValueError("tuning: full needs a mode that trains one policy; an ensemble is made of LoRA adapters")
        if (self.mode == "weighted") != bool(self.preferences):
            raise ValueError("mode weighted and preferences go together, for example preferences={helpful: 2, polite: 1}")


@dataclass(frozen=True, config=_strict)
class ValueConfig:
    scalarize: Literal["mean", "weighted", "minimum", "chebyshev"] = "mean"
    """how a vector of scores becomes one value: mean (paper), weighted (mean weighted by the preferences), minimum, or
    chebyshev (distance to the best of every objective)"""
    preferences: dict[str, float] = Field(default_factory=dict)
    """objective -> importance, for weighted and chebyshev; all equal by default"""


@dataclass(frozen=True, config=_strict)
class EnsembleConfig:
    aggregate: Literal["hidden_states", "parameters"] = "hidden_states"
    """what the weights average: the policies' last hidden states while decoding (EMORL), or their parameters (soups)"""
    adapter_scale: float = Field(default=1.0, gt=0)
    """every adapter is multiplied by this before they are combined: a mean of K policies holds only 1/K of what each has
    learned, a scale up to K gives that back (task arithmetic's coefficient)"""
    include_base: bool = False
    """the untrained base takes part as one more policy"""


@dataclass(frozen=True, config=_strict)
class SearchConfig:
    proposer: str = "auto"
    """simplex_refinement (what auto stands for), hierarchical_grid (paper), or an Optuna sampler: tpe, gp, nsga2, cma_es,
    qmc, random"""
    levels: int = Field(default=5, ge=1, le=12)
    """how fine simplex_refinement and hierarchical_grid become: halvings of their step (paper: 5, a precision of 1/32)"""
    trials: int | None = Field(default=None, ge=1)
    """budget: most candidates evaluated; an Optuna sampler without any budget gets 100. A search that a budget ended goes
    on when it is run again with a larger one"""
    seconds: float | None = Field(default=None, gt=0)
    """budget: seconds of decoding and scoring, over all workers and restarts; ends the search before a candidate that would
    probably exceed it"""
    tokens: int | None = Field(default=None, ge=1)
    """budget: tokens of all candidates' texts, in the same way"""
    race: float | None = Field(default=None, gt=0.5, lt=1)
    """confidence (such as 0.95) at which a candidate is given up on the first prompts, when the best found so far is
    better on the same ones; it then has scores of these only and is in no front. Off by default: every candidate sees
    every prompt"""
    race_prompts: int = Field(default=8, ge=2)
    """prompts of a race's first round; each further round doubles them"""
    samples: int = Field(default=1, ge=1)
    """completions per prompt (more than one only makes sense with sampling)"""
    batch: int = Field(default=32, ge=1)
    """candidates decoded together, which share the work where their texts agree; a kill loses at most these"""
    memory: float | None = Field(default=None, gt=0)
    """GiB for the caches and remembered prefixes of greedy decoding; half of what is free by default. Less takes longer
    and gives the same tokens"""
    storage: str | None = None
    """any Optuna storage URL, for several workers or a dashboard, without a password (PGPASSWORD gives it); a journal file in
    the run directory by default, for workers of one machine: on a network disk its locks may not hold"""
    generation: dict[str, Any] = Field(default_factory=dict)
    """generation settings of the search alone; the experiment's otherwise"""


@dataclass(frozen=True, config=_strict)
class EvaluateConfig:
    samples: int = Field(default=1, ge=1)
    """completions per prompt"""
    batch: int = Field(default=64, ge=1)
    """prompts decoded in one batch"""
    front_points: int = Field(default=8, ge=1)
    """most points of the search's front that are scored again on the test prompts"""
    perplexity_model: str | None = None
    """hub id or folder of a causal language model: adds the completions' perplexity under it (paper: openai-community/gpt2)"""
    attacks: bool = True
    """check whether the rewards can be hacked: by trivial answers, by length, by the same answer for everyone; about 2000
    scores per objective. Switch it off where a score costs money"""
    references: str | None = None
    """column of the data with good responses, a text or a list of texts: the attacks must stay under the test prompts' ones,
    and the training prompts' ones are tried as the one answer for everyone"""


Method = Literal["ensemble", "soups", "scaled_ensemble", "scaled_soups", "uniform", "weighted", "gdpo", "dynaopt"]


@dataclass(frozen=True, config=_strict)
class CompareConfig:
    methods: list[Method] = Field(default_factory=lambda: ["ensemble", "soups", "uniform", "gdpo", "dynaopt"], min_length=1)
    """ensemble: one policy per objective, hidden states averaged (EMORL); soups: the same policies, parameters averaged;
    scaled_ensemble and scaled_soups: with their adapters times `adapter_scale`; the others are train.mode's: one policy that
    trains as many steps as all of the ensemble's together. weighted trains one policy for each entry of `preferences`, which
    share these steps"""
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2], min_length=1)
    """one training, search and comparison with each; prompts are split alike in all"""
    preferences: list[dict[str, float]] = Field(default_factory=list)
    """of method weighted"""
    adapter_scale: float = Field(default=2.0, gt=0)
    """of the scaled methods"""
    tuning: Literal["lora", "full"] = "lora"
    """of the single policies; full as the authors' were, with more parameters than the ensemble has"""
    bootstrap: int = Field(default=4000, ge=100)
    """resamples of seeds and prompts, for the intervals"""

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < len(self.seeds) or len(set(self.methods)) < len(self.methods):
            raise ValueError("methods and seeds: each of them once")
        borrowed = [method for method in self.methods if method in ("soups", "scaled_ensemble", "scaled_soups")]
        if borrowed and "ensemble" not in self.methods:
            raise ValueError(f"method {borrowed[0]} combines the ensemble's policies; compare the ensemble too")
        if ("weighted" in self.methods) != bool(self.preferences):
            raise ValueError("method weighted and preferences go together, such as [{helpful: 2, polite: 1}, {polite: 1}]")


@dataclass(frozen=True, config=_strict)
class Experiment:
    output: Path
    """directory of all runs of this experiment"""
    base: BaseConfig
    """the language model that all policies share"""
    data: DataConfig
    """the prompts"""
    objectives: dict[str, ObjectiveConfig]
    """name -> objective; one policy is trained for each"""
    seed: int = Field(default=0, ge=0)
    """seed of splits, training, sampling and search"""
    generation: dict[str, Any] = Field(default_factory=lambda: {"max_new_tokens": 64, "do_sample": False})
    """straight to transformers' generate() in search, evaluation and `emorl generate`"""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """training of the policies"""
    value: ValueConfig = Field(default_factory=ValueConfig)
    """what a trade-off is worth: to the search, a fusion and a dynamic ensemble"""
    ensemble: EnsembleConfig = Field(default_factory=EnsembleConfig)
    """how the policies are combined"""
    search: SearchConfig = Field(default_factory=SearchConfig)
    """search for the weights"""
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    """comparison on the test prompts"""
    fuse: PolicyFuseConfig = Field(default_factory=PolicyFuseConfig)
    """`emorl fuse`: the policies' parameters become one policy"""
    dynamic: DynamicConfig = Field(default_factory=DynamicConfig)
    """`emorl dynamic`: an agent that sets the weights anew for every span of text"""
    compare: CompareConfig = Field(default_factory=CompareConfig)
    """`emorl compare`: this ensemble and its rivals at the same budget of training prompts"""
    policies: Path | dict[str, Path] | None = None
    """another experiment's output, whose trained policies are used, or {name: folder of its LoRA adapter} for each objective:
    nothing is trained here"""

    def __post_init__(self) -> None:
        if not self.objectives:
            raise ValueError("objectives: name at least one objective")
        for name in self.objectives:
            if not name.isidentifier() or name in RESERVED_NAMES:
                raise ValueError(
                    f"objectives: {name!r} cannot name an objective; use letters, digits and _, but no column of the results"
                )
        for where, preferences in (
            ("train", self.train.preferences),
            ("value", self.value.preferences),
            *(("compare", one) for one in self.compare.preferences),
        ):
            _check_preferences(where, preferences, list(self.objectives))
        if self.fuse.strata is not None and (
            self.value.scalarize not in ("mean", "weighted") or self.generation.get("do_sample") or self.search.samples > 1
        ):
            raise ValueError(
                "fuse.strata compares candidates prompt by prompt: decode greedily, and scalarize by mean or weighted"
            )
        if isinstance(self.policies, dict) and set(self.policies) != set(self.policy_names):
            raise ValueError(f"policies: expected one adapter for each of {self.policy_names}, got {sorted(self.policies)}")
        if self.search.race is not None and self.value.scalarize == "chebyshev":
            raise ValueError("search.race: chebyshev has no value before all policies are evaluated; use another scalarize")

    @property
    def policy_names(self) -> list[str]:
        """The policies that `train.mode` trains: one for each objective, or a single one that bears the mode's name."""
        return list(self.objectives) if self.train.mode == "ensemble" else [self.train.mode]


def _check_preferences(where: str, preferences: Mapping[str, float], objectives: Sequence[str]) -> None:
    unknown = sorted(set(preferences) - set(objectives))
    if unknown:
        raise ValueError(f"{where}.preferences names {unknown}, but the objectives are {sorted(objectives)}")
    numbers = list(preferences.values())
    if numbers and (min(numbers) < 0 or sum(numbers) == 0):
        raise ValueError(f"{where}.preferences must not be negative and not all 0, got {dict(preferences)}")


RESERVED_NAMES = frozenset(
    {
        *("base", "system", "kind", "prompt", "prompt_index", "sample", "completion", "completions", "tokens", "front"),
        *(
            "mean",
            "mean_error",
            "minimum",
            "all_above_median",
            "collapsed",
            "distinct_share",
            "distinct_2",
            "diversity_2",
            "edit_rate",
            "words",
        ),
        *("words_deviation", "repeated_trigrams", "perplexity", "paper_perplexity"),
    }
)
"""columns of the completions and summary tables, and the name of the base among the policies."""


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment in a YAML file with `dotted.key=value` overrides applied."""
    content = apply_overrides(read_yaml(path), overrides)
    if is_checkpoints(content):
        raise UserError(f"{path} is a file of checkpoints to fuse, not an experiment: use `emorl fuse {path}`")
    return parse(Experiment, content, str(path))


def load_kept_experiment(directory: Path) -> Experiment:
    """The experiment whose stages have run in `directory` (its resolved copy there)."""
    resolved = directory / "experiment.yaml"
    if not resolved.is_file():
        raise UserError(f"{directory} is not a run directory (no experiment.yaml in it); run `emorl run` first")
    return replace(load_experiment(resolved), output=directory)  # it may have been moved
