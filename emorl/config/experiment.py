"""The experiment file: one frozen dataclass per block, shared by all stages.

They stand here, not beside each stage's `run`, so that a wrong experiment file fails before torch is imported.
Blocks named after another library (`lora`, `grpo`, `generation`) go straight to that library.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from emorl.config import UserError
from emorl.config.base import BaseConfig
from emorl.config.data import DataConfig
from emorl.config.distill import DistillConfig
from emorl.config.dynamic import DynamicConfig
from emorl.config.fuse import PolicyFuseConfig, is_checkpoints
from emorl.config.objective import ObjectiveConfig, PairsConfig
from emorl.config.serve import ServeConfig
from emorl.config.train import Method as TrainMethod
from emorl.config.train import TrainConfig
from emorl.config.yaml import apply_overrides, parse, read_yaml

_strict = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


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


Method = Literal[
    "ensemble", "soups", "scaled_ensemble", "scaled_soups", "uniform", "weighted", "gdpo", "dynaopt",
    "ensemble_dpo", "soups_dpo", "uniform_dpo", "weighted_dpo",
]  # fmt: skip


@dataclass(frozen=True, config=_strict)
class CompareConfig:
    methods: list[Method] = Field(default_factory=lambda: ["ensemble", "soups", "uniform", "gdpo", "dynaopt"], min_length=1)
    """ensemble: one policy per objective, hidden states averaged (EMORL); soups: the same policies, parameters averaged;
    scaled_ensemble and scaled_soups: with their adapters times `adapter_scale`; the others are train.mode's: one policy that
    trains as many steps as all of the ensemble's together. weighted trains one policy for each entry of `preferences`, which
    share these steps. Those that end in _dpo are trained offline, on one set of samples of the base that all of them share
    (`train.samples`, `train.dpo`): their samples and seconds are told beside the others'"""
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2], min_length=1)
    """one training, search and comparison with each; prompts are split alike in all"""
    preferences: list[dict[str, float]] = Field(default_factory=list)
    """of methods weighted and weighted_dpo"""
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
        if "soups_dpo" in self.methods and "ensemble_dpo" not in self.methods:
            raise ValueError("method soups_dpo combines the policies of ensemble_dpo; compare that too")
        if bool({"weighted", "weighted_dpo"} & set(self.methods)) != bool(self.preferences):
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
    distill: DistillConfig = Field(default_factory=DistillConfig)
    """`emorl distill`: the ensemble becomes one adapter"""
    serve: ServeConfig = Field(default_factory=ServeConfig)
    """`emorl serve`: what the server takes on at once"""
    compare: CompareConfig = Field(default_factory=CompareConfig)
    """`emorl compare`: this ensemble and its rivals at the same budget of training prompts"""
    policies: Path | dict[str, Path] | None = None
    """another experiment's output, whose trained policies are used, or {name: folder of its LoRA adapter} for each objective:
    nothing is trained here"""

    def __post_init__(self) -> None:
        if not self.objectives:
            raise ValueError("objectives: name at least one objective")
        if self.train.mode != "ensemble":
            self._check_one_policy()
        for name in self.objectives:
            if not name.isidentifier() or name in RESERVED_NAMES:
                raise ValueError(
                    f"objectives: {name!r} cannot name an objective; use letters, digits and _, but no column of the results"
                )
        for where, preferences in (
            ("train.preferences", self.train.preferences),
            ("value.preferences", self.value.preferences),
            ("distill.prefer", self.distill.prefer),
            *(("compare.preferences", one) for one in self.compare.preferences),
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

    def method_of(self, policy: str) -> TrainMethod | None:
        """How a policy is trained; None leaves it to what the base is."""
        if self.train.mode != "ensemble":
            return self.train.method
        objective = self.objectives[policy]
        return objective.method or ("dpo" if objective.pairs else self.train.method)

    def pairs_of(self, policy: str) -> PairsConfig | None:
        """The pairs that people made, where a policy is trained on such; its objective is then called as it is."""
        return self.objectives[policy].pairs if self.train.mode == "ensemble" else None

    def makes_pairs(self, policy: str) -> bool:
        """Whether a policy is trained on pairs of sampled answers."""
        return self.method_of(policy) == "dpo" and self.pairs_of(policy) is None

    def _check_one_policy(self) -> None:
        """Each objective of a single policy must score answers, and cannot have a method of its own."""
        for name, objective in self.objectives.items():
            if objective.function is None:
                raise ValueError(f"objectives.{name}: train.mode={self.train.mode} needs scores; give it a function")
            if objective.pairs is not None:
                raise ValueError(f"objectives.{name}.pairs: train.mode={self.train.mode} trains on scores; leave them out")
            if objective.method is not None:
                raise ValueError(f"objectives.{name}.method: train.mode={self.train.mode} trains one policy; use train.method")


def _check_preferences(where: str, preferences: Mapping[str, float], objectives: Sequence[str]) -> None:
    unknown = sorted(set(preferences) - set(objectives))
    if unknown:
        raise ValueError(f"{where} names {unknown}, but the objectives are {sorted(objectives)}")
    numbers = list(preferences.values())
    if numbers and (min(numbers) < 0 or sum(numbers) == 0):
        raise ValueError(f"{where} must not be negative and not all 0, got {dict(preferences)}")


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
