"""What a run directory holds, of every stage that has run, read once for tables, figures, the HTML report and notebooks.

>>> load_run("runs/quickstart").summary
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from emorl.config import UserError
from emorl.config.experiment import Experiment, load_kept_experiment
from emorl.evaluation.hacking import Attacks
from emorl.evaluation.tables import read_table
from emorl.runs.layout import (
    ATTACKS,
    COMPLETIONS,
    COST,
    MANIFEST,
    POINTS,
    RESULT,
    SEEDS,
    STAGES,
    SUMMARY,
    TRIALS,
    Layout,
)
from emorl.runs.results import (
    BASE,
    DistillationResult,
    DynamicResult,
    EvaluationResult,
    FusionResult,
    MethodsResult,
    SearchResult,
    TrainingResult,
    read_result,
)
from emorl.runs.run import Cost, read_cost, read_json

METRICS = (
    "all_above_median",
    "diversity_2",
    "edit_rate",
    "words_deviation",
    "repeated_trigrams",
    "perplexity",
    "paper_perplexity",
)
"""columns of the summary beside scores, distinct answers and words; perplexities only where they were measured"""
_TRAINING = ("method", "steps", "best_step", "stopped", "base_reward", "reward", "kl", "base_distinct_share", "distinct_share",
             "words", "collapsed", "pairs", "pair_accuracy")  # fmt: skip
_RESULTS = {
    "search": ("search", SearchResult),
    "evaluate": ("evaluate", EvaluationResult),
    "compare": ("compare", MethodsResult),
    "fuse": ("fuse", FusionResult),
    "dynamic": ("dynamic/comparison", DynamicResult),
    "distill": ("distill", DistillationResult),
}


@dataclass(frozen=True)
class Results:
    """An experiment's results as data frames and dataclasses; None, or empty, where a stage has not run.

    `training` is by policy, of those that emorl trained here. `trials` holds every candidate of the search, `summary` one row
    for each system on the test prompts, `completions` all their scored answers and `attacks` whether the rewards can be hacked.
    `fusion_trials` holds the candidates of a fusion search; `points` every trade-off and `seeds` each method and seed of
    `emorl compare`.
    """

    output: Path
    experiment: Experiment
    training: Mapping[str, TrainingResult]
    search: SearchResult | None
    trials: pd.DataFrame | None
    evaluation: EvaluationResult | None
    summary: pd.DataFrame | None
    completions: pd.DataFrame | None
    attacks: Attacks | None
    fusion: FusionResult | None
    fusion_trials: pd.DataFrame | None
    methods: MethodsResult | None
    points: pd.DataFrame | None
    seeds: pd.DataFrame | None
    dynamic: DynamicResult | None
    distilled: DistillationResult | None
    costs: pd.DataFrame
    versions: Mapping[str, str]

    @property
    def objectives(self) -> list[str]:
        """Those that were evaluated, else those of the experiment."""
        return list(self.experiment.objectives if self.evaluation is None else self.evaluation.objectives)

    @property
    def policies(self) -> list[str]:
        """What the weights belong to: the objectives' policies, and the base where it takes part."""
        return [] if self.search is None else list(self.search.best.weights)

    @property
    def ran(self) -> list[str]:
        """Stages that have run here."""
        parts = (self.training, self.search, self.evaluation, self.methods, self.fusion, self.dynamic, self.distilled)
        return [stage for stage, part in zip(STAGES, parts, strict=True) if part]

    @property
    def missing(self) -> list[str]:
        """Stages that have not, of those that this experiment can have."""
        possible = STAGES if self.experiment.train.mode == "ensemble" else ("train",)
        refused = () if self.experiment.policies is None else ("train", "compare")
        if self.experiment.ensemble.aggregate != "hidden_states":
            refused = (*refused, "distill")
        return [stage for stage in possible if stage not in (*self.ran, *refused)]

    @property
    def training_table(self) -> pd.DataFrame:
        """How the training of each policy ended, one row for each, indexed by its name; scores on the validation prompts."""
        rows = [
            {**{key: getattr(result, key) for key in _TRAINING}, **{f"score_{name}": s for name, s in result.scores.items()}}
            for result in self.training.values()
        ]
        return pd.DataFrame(rows, index=pd.Index(self.training, name="policy"))

    @property
    def methods_table(self) -> pd.DataFrame | None:
        """Means over seeds of `emorl compare`, one row for each method, indexed by its name."""
        if self.methods is None:
            return None
        rows = {name: {key: spread.mean for key, spread in row.items()} for name, row in self.methods.methods.items()}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")

    @property
    def evaluated(self) -> "Evaluated":
        """The evaluation's parts.

        Raises:
            UserError: it has not finished.
        """
        if self.evaluation is None or self.summary is None or self.completions is None:
            stage = "run" if self.search is None else "evaluate"
            file = Layout(self.output).experiment
            raise UserError(f"{self.output} has no finished evaluation; run `emorl {stage} {file}` first")
        return Evaluated(self.evaluation, self.summary, self.completions)


@dataclass(frozen=True)
class Evaluated:
    """Systems on the test prompts: what was compared, one row for each, and all their answers."""

    result: EvaluationResult
    summary: pd.DataFrame
    completions: pd.DataFrame

    @property
    def test_prompts(self) -> int:
        return int(self.completions["prompt_index"].nunique())

    @property
    def collapsed(self) -> list[str]:
        """Systems whose distinct completions fell under the experiment's share of the base's."""
        return self.summary.loc[self.summary["collapsed"], "system"].tolist()

    @property
    def base_distinct_share(self) -> float:
        return float(self.summary.set_index("system").loc[BASE, "distinct_share"])


def load_run(output: str | Path) -> Results:
    """The results in an experiment's output directory.

    Raises:
        UserError: no run directory, or a damaged file in it.
    """
    output = Path(output)
    experiment, layout = load_kept_experiment(output), Layout(output)
    kept = {stage: _result(output / folder, kind) for stage, (folder, kind) in _RESULTS.items()}
    evaluated, searched = kept["evaluate"] is not None, kept["search"] is not None
    attacks = layout.evaluation / ATTACKS
    return Results(
        output=output,
        experiment=experiment,
        training=_training(experiment),
        search=kept["search"],
        trials=_trials(layout.search, kept["search"]) if searched else None,
        evaluation=kept["evaluate"],
        summary=_evaluated(layout.evaluation / SUMMARY, len(kept["evaluate"].systems)) if evaluated else None,
        completions=_evaluated(layout.evaluation / COMPLETIONS) if evaluated else None,
        attacks=read_result(Attacks, layout.evaluation, ATTACKS) if evaluated and attacks.exists() else None,
        fusion=kept["fuse"],
        fusion_trials=_table(layout.fusion / TRIALS),
        methods=kept["compare"],
        points=_table(layout.comparison / POINTS),
        seeds=_table(layout.comparison / SEEDS),
        dynamic=kept["dynamic"],
        distilled=kept["distill"],
        costs=cost_table(output),
        versions=_versions(output),
    )


def _result(folder: Path, kind: type) -> Any:
    """A stage's result; None where it has not finished."""
    manifest = folder / MANIFEST
    if not (folder / RESULT).exists() or (manifest.exists() and not read_json(manifest).get("finished")):
        return None
    return read_result(kind, folder)


def _training(experiment: Experiment) -> dict[str, TrainingResult]:
    results = {name: _result(folder, TrainingResult) for name, folder in _training_folders(experiment).items()}
    return {name: result for name, result in results.items() if result is not None}


def _training_folders(experiment: Experiment) -> dict[str, Path]:
    """Of the policies that emorl has trained, here or in another experiment."""
    layout = Layout(experiment.output, experiment.policies)
    return {name: layout.training(name) for name in experiment.policy_names if not isinstance(layout.policies, Mapping)}


def _trials(folder: Path, result: SearchResult) -> pd.DataFrame:
    remedy = "`emorl search` or `emorl report` writes it again from the study"
    return read_table(folder / TRIALS, ["trial", "value", "front"], remedy, result.trials)


def _evaluated(file: Path, rows: int | None = None) -> pd.DataFrame:
    return read_table(file, ["system"], f"remove {file}, and `emorl evaluate` makes it again of the tables beside it", rows)


def _table(file: Path) -> pd.DataFrame | None:
    return read_table(file, [], f"remove {file} and run its stage again") if file.exists() else None


def _versions(output: Path) -> dict[str, str]:
    """Of the packages that the newest stage ran with."""
    manifests = sorted(output.glob(f"**/{MANIFEST}"), key=lambda file: file.stat().st_mtime)
    return read_json(manifests[-1])["versions"] if manifests else {}


def cost_table(output: Path) -> pd.DataFrame:
    """One row per stage that has said what it cost, indexed by its name, and their `total`; columns as in `Cost`. What
    `emorl compare` cost is the training and searching of all its methods."""
    experiment, layout = load_kept_experiment(output), Layout(output)
    stages = {
        "quickstart": [output / "quickstart" / COST],
        "samples": [layout.samples / COST],
        **{f"train {name}": [folder / COST] for name, folder in _training_folders(experiment).items()},
        **{stage: [layout.stage(stage) / COST] for stage in ("search", "evaluate", "fuse", "distill")},
        "compare": list(output.glob(f"{layout.seed('*').name}/**/{COST}")),
    }
    read = {name: [read_cost(file.parent) for file in files if file.exists()] for name, files in stages.items()}
    costs = {name: sum(parts, Cost()) for name, parts in read.items() if parts}
    costs["total"] = sum(costs.values(), Cost())
    return pd.DataFrame([asdict(cost) for cost in costs.values()], index=pd.Index(costs, name="stage"))


def validations_table(result: TrainingResult) -> pd.DataFrame:
    """The validations of one policy's training: step, reward, distinct_share, distinct_2, words (step 0 is the base)."""
    return pd.DataFrame([asdict(validation) for validation in result.validations])


def paired_difference(completions: pd.DataFrame, system: str, other: str, objectives: list[str]) -> tuple[float, float]:
    """Mean score of a system minus that of `other` over the objectives, with its standard error over prompts.

    Both answered the same prompts, so the error of the difference is smaller than the two errors together.
    """
    per_prompt = completions.groupby(["system", "prompt_index"])[objectives].mean()
    difference = (per_prompt.loc[system] - per_prompt.loc[other]).mean(axis=1)
    return float(difference.mean()), float(difference.sem())


def generations(completions: pd.DataFrame, systems: list[str], prompts: int) -> pd.DataFrame:
    """The first sample of the first `prompts` prompts, one column per system, indexed by (prompt_index, prompt)."""
    first = completions[completions["sample"] == completions["sample"].min()]
    table = first.pivot(index=["prompt_index", "prompt"], columns="system", values="completion")
    return table[systems].head(prompts)
