"""What stages find, as frozen dataclasses: each is a run directory's `result.json`. Kept free of torch.

Scores and rewards are means over prompts and are maximised; weights and scores are by name.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from emorl.config import UserError
from emorl.runs.layout import ENSEMBLE, RESULT, Layout
from emorl.runs.run import read_json, write_json

Result = TypeVar("Result")
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""a number that may not exist: NaN, and null in JSON"""


@dataclass(frozen=True)
class Point:
    """A trade-off that a search evaluated: weights of the policies, scores of the objectives, and their one value."""

    weights: Mapping[str, float]
    scores: Mapping[str, float]
    value: float


@dataclass(frozen=True)
class Validation:
    """A policy in training on the validation prompts; step 0 is the base. Shares are of distinct completions."""

    step: int
    reward: float
    distinct_share: float
    distinct_2: float
    words: float


@dataclass(frozen=True)
class TrainingResult:
    """How the training of one policy ended: the checkpoint that was kept (`best_step`), beside the base.

    `kl` is its KL to the base in nats per token of its validation answers, None where nothing could be compared; `scale` and
    `scores_outside_range` are its objectives'; in `log`, the trainer's own, `reward` is what training maximised. Of a
    policy that learned from pairs: how many, and its accuracy on those held out (the base has 0.5), which is also its `reward`
    where no objective scores; `prompts_per_step` then counts pairs.
    """

    objective: str
    reward_weights: Mapping[str, float]
    steps: int
    best_step: int
    stopped: str
    prompts_per_step: int
    base_reward: float
    reward: float
    scores: Mapping[str, float]
    kl: float | None
    scale: str
    scores_outside_range: int
    base_distinct_share: float
    distinct_share: float
    words: float
    collapsed: bool
    log: Sequence[Mapping[str, Any]]
    method: str = ""
    pairs: int | None = None
    pair_accuracy: float | None = None

    @property
    def validations(self) -> list[Validation]:
        """Of every validated step, the newest of each."""
        keys = ("reward", "distinct_share", "distinct_2", "words")
        logged = [entry for entry in self.log if "eval_reward" in entry]
        by_step = {entry["step"]: Validation(entry["step"], *(entry[f"eval_{key}"] for key in keys)) for entry in logged}
        return list(by_step.values())


@dataclass(frozen=True)
class SamplesResult:
    """Answers of the base to the training prompts: how many prompts and answers to each, how long these are and which share of
    them is distinct."""

    prompts: int
    per_prompt: int
    words: float
    distinct_share: float


@dataclass(frozen=True)
class SearchResult:
    """What a weight search found on the validation prompts: maxima over noisy estimates, and so too high. `ended_by_budget`
    holds the budget that ended it, None where it came to its own end."""

    proposer: str
    scalarize: str
    preferences: Mapping[str, float]
    trials: int
    ended_by_budget: Mapping[str, float | None] | None
    best: Point
    front: Sequence[Point]
    prompts: str = "validation"


class Kind(StrEnum):
    """What a compared system is."""

    BASE = "base"
    POLICY = "policy"
    ENSEMBLE = "ensemble"
    FRONT = "front"
    PARAMETER_AVERAGE = "parameter_average"
    DYNAMIC = "dynamic"
    DISTILLED = "distilled"


BASE = "base"
BEST = "ensemble, best found"
"""names of two systems that tables and sentences single out"""


@dataclass(frozen=True)
class System:
    """One line of the comparison on test prompts; weights by policy name, none where nothing is mixed. `adapter` is the digest
    of a distilled one: the same weights may be distilled anew."""

    name: str
    kind: Kind
    weights: Mapping[str, float]
    adapter: str = ""


@dataclass(frozen=True)
class EvaluationResult:
    """The systems that were compared on the test prompts, and the hypervolume of what each way offers (direction: maximise)."""

    objectives: Sequence[str]
    systems: Sequence[System]
    hypervolume: Mapping[str, float]
    reference_point: Mapping[str, float]
    direction: str = "maximise"
    prompts: str = "test"


@dataclass(frozen=True)
class FusionResult:
    """How policies were fused: by one method for the whole model, or, of a search over layers, by a column for each.

    Of a search also which proposer found it among how many trials (`budget` were allowed), its scores on the validation
    prompts, on the test prompts, and on the holdout where the evaluation set moved.
    """

    method: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)
    proposer: str | None = None
    prompts: str = "validation"
    scores: Mapping[str, float] = field(default_factory=dict)
    value: float | None = None
    trials: int = 0
    budget: int = 0
    test: Mapping[str, float] = field(default_factory=dict)
    holdout: Mapping[str, float] = field(default_factory=dict)
    holdout_errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds; None where one does not exist."""

    mean: float | None
    deviation: float | None


@dataclass(frozen=True)
class Interval:
    """One method less another one: the difference, its 95 % interval of resampled seeds and prompts, and the share of resamples
    in which it is above 0."""

    difference: float
    low: float
    high: float
    above: float


@dataclass(frozen=True)
class MethodsResult:
    """Methods at equal budgets: columns of each one's table over seeds, and by how much the `first` is ahead of each other one
    (in `mean` and `hypervolume`)."""

    objectives: Sequence[str]
    seeds: Sequence[int]
    test_prompts: int
    first: str
    methods: Mapping[str, Mapping[str, Spread]]
    differences: Mapping[str, Mapping[str, Interval]]
    best_rival: Mapping[str, str | None]
    reference_point: Mapping[str, float]
    direction: str = "maximise"


@dataclass(frozen=True)
class Retention:
    """What one adapter keeps of the ensemble's gain over the soup of the same weights, on the test prompts, with 95 % intervals
    of resampled prompts. The share is None where the gain's interval holds 0: ensemble and soup do not differ there."""

    gain: Number
    gain_low: Number
    gain_high: Number
    share: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class TradeOff:
    """Weights of the policies, and what ensemble, soup and distilled do at them on the test prompts: scores, their weighted
    mean `value`, the KL from the ensemble in nats per token of its answers, words, distinct share. `held_out` ones were never
    trained on, nor any near them."""

    name: str
    weights: Mapping[str, float]
    held_out: bool = False
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    value: Mapping[str, float] = field(default_factory=dict)
    divergence: Mapping[str, float] = field(default_factory=dict)
    words: Mapping[str, float] = field(default_factory=dict)
    distinct_share: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DistillationResult:
    """How the ensemble became one adapter: `start` is what it was before its first step, of a soup `kept_energy` says which
    share its rank could hold. Divergences are on validation texts; `kept` and `trade_offs` on the test prompts.

    With `front`, the adapter reads weights in a line of the prompt. Then nothing is `kept`, as no one soup is its rival;
    `hypervolume` is what ensemble, soup and distilled
    offer at the same trade-offs (direction: maximise), and `follows` the correlation of each score with the ensemble's over all
    trade-offs, held out or not: 1 where the adapter obeys the line, about 0 where it does not read it.
    """

    front: bool
    start: str
    kept_energy: float
    steps: int
    best_step: int
    answers_per_step: int
    first_divergence: float
    divergence: float
    trade_offs: Sequence[TradeOff]
    kept: Mapping[str, Retention] = field(default_factory=dict)
    hypervolume: Mapping[str, float] = field(default_factory=dict)
    reference_point: Mapping[str, float] = field(default_factory=dict)
    follows: Mapping[str, Number] = field(default_factory=dict)
    log: Sequence[Mapping[str, Any]] = ()
    prompts: str = "test"


@dataclass(frozen=True)
class RewardResult:
    """What a reward model's training measured on its validation rows, and the trainer's log."""

    figures: Mapping[str, float]
    log: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RefreshRound:
    """One round of an adversarial refresh: its policy, how many rows of each kind were added and held out, their mean scores
    and the reward model's validation figures before and after."""

    policy: Mapping[str, float | None]
    added: Mapping[str, int]
    held_out: Mapping[str, int]
    added_before: Mapping[str, float]
    added_after: Mapping[str, float]
    held_out_before: Mapping[str, float]
    held_out_after: Mapping[str, float]
    validation_before: Mapping[str, float]
    validation_after: Mapping[str, float]


@dataclass(frozen=True)
class RefreshResult:
    """The refreshed reward model, and what every round found and changed."""

    model: str
    rounds: Sequence[RefreshRound]


@dataclass(frozen=True)
class FixedPoint:
    """Weights of models that stay as they are, and their mean value on the validation prompts."""

    weights: Mapping[str, float]
    validation: float


@dataclass(frozen=True)
class FixedResult:
    """The best fixed weights among those that were tried."""

    best: FixedPoint
    tried: Sequence[FixedPoint]


@dataclass(frozen=True)
class AgentResult:
    """How the training of an agent ended: the value on the validation prompts of the one that was kept, which is that of
    `update`, among `updates`."""

    validation: float
    update: int
    updates: int


@dataclass(frozen=True)
class DynamicSystem:
    """One line of the comparison of a dynamic ensemble: mean value on the test prompts with its standard error over them
    (None of a single one), gain on the best fixed weights with a 95 % interval of paired resamples, tokens per second, and the
    share of the time that choosing weights took. Only agents have a span."""

    name: str
    span: int | str | None
    value: float
    error: float | None
    gain: float
    gain_low: float
    gain_high: float
    scores: Mapping[str, float] = field(default_factory=dict)
    mean_weights: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    tokens_per_second: float = 0.0
    choosing_share: float = 0.0


@dataclass(frozen=True)
class DynamicResult:
    """Trained agents against their rivals on the test prompts; `best` is the kind of the agent with the best validation, all of
    them after `updates`."""

    systems: Sequence[DynamicSystem]
    best: str
    fixed: FixedPoint
    objectives: Sequence[str]
    prompts: int
    updates: int
    device: str
    threads: int


def as_json(result: Any) -> Any:
    """A result as JSON values; a number that does not exist is null."""
    return without_nan(TypeAdapter(type(result)).dump_python(result, mode="json"))


def write_result(folder: Path, result: Any) -> None:
    write_json(folder / RESULT, as_json(result))


def read_result(kind: type[Result], folder: Path, name: str = RESULT) -> Result:
    """What a stage wrote into its run directory, its result or another JSON file.

    Raises:
        UserError: nothing there, or a damaged file.
    """
    file = folder / name
    try:
        return TypeAdapter(kind).validate_python(read_json(file))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise UserError(f"{file} is damaged ({where}: {first['msg']}); move {folder} away and run the stage again") from None


def best_dynamic_ensemble(layout: Layout) -> Path | None:
    """Folder of the dynamic ensemble that was best on the validation prompts; None before one is trained."""
    validations = {
        file.parent / ENSEMBLE: read_result(AgentResult, file.parent).validation
        for file in sorted(layout.dynamic.glob(f"*/{RESULT}"))
        if (file.parent / ENSEMBLE).is_dir()
    }
    return max(validations, key=lambda folder: validations[folder]) if validations else None


def without_nan(value: Any) -> Any:
    """JSON values with null for a number that does not exist."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
