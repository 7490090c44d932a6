"""What a finished run directory holds, read once for tables, figures, the HTML report and the notebook. Kept free of torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from emorl.config import UserError
from emorl.config.experiment import Experiment, load_run
from emorl.runs.run import Cost, read_json

BEST = "ensemble, best found"
BASE = "base"
METRICS = ("diversity_2", "edit_rate", "words_deviation", "repeated_trigrams", "perplexity", "paper_perplexity")
"""columns of the summary that not every run has"""


@dataclass(frozen=True)
class Results:
    """A compared experiment.

    `trials`, `summary` and `completions` are the tables of `search/trials.csv`, `evaluate/summary.csv` and
    `evaluate/completions.parquet`; `search` is the search's `result.json` and `indicators` the comparison's;
    `training` maps an objective to the `result.json` of its policy, if emorl trained it; `hacking` is the comparison's
    `hacking.json`, None where nothing was attacked; `fusion` and `fusion_trials` are what `emorl fuse` has found in
    this output, None where it has not run, or not searched. Metrics that a run of an older version lacks are NaN in `summary`.
    """

    output: Path
    experiment: Experiment
    search: Mapping[str, Any]
    trials: pd.DataFrame
    summary: pd.DataFrame
    completions: pd.DataFrame
    indicators: Mapping[str, Any]
    training: Mapping[str, Mapping[str, Any]]
    costs: pd.DataFrame
    versions: Mapping[str, str]
    hacking: Mapping[str, Any] | None = None
    fusion: Mapping[str, Any] | None = None
    fusion_trials: pd.DataFrame | None = None

    @property
    def objectives(self) -> list[str]:
        return list(self.indicators["objectives"])

    @property
    def policies(self) -> list[str]:
        """What the weights belong to: the objectives' policies, and the base where it takes part."""
        return [name.removeprefix("weight_") for name in self.trials.columns if name.startswith("weight_")]

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


def read_results(output: Path) -> Results:
    """The results in an experiment's output directory.

    Raises:
        UserError: no run directory, or its comparison (`emorl evaluate`) is not finished.
    """
    experiment = load_run(output)
    manifest_path = output / "evaluate" / "run.json"
    manifest = read_json(manifest_path) if manifest_path.exists() else {}
    if not manifest.get("finished"):
        stage = "evaluate" if (output / "search" / "result.json").exists() else "run"
        raise UserError(f"{output} has no finished comparison; run `emorl {stage} {output / 'experiment.yaml'}` first")
    hacking_path, fused = output / "evaluate" / "hacking.json", output / "fuse"
    trained = {name: experiment.training_of(name) / "result.json" for name in experiment.objectives}
    return Results(
        output=output,
        experiment=experiment,
        search=read_json(output / "search" / "result.json"),
        trials=pd.read_csv(output / "search" / "trials.csv"),
        summary=_with_metrics(pd.read_csv(output / "evaluate" / "summary.csv")),
        completions=pd.read_parquet(output / "evaluate" / "completions.parquet"),
        indicators=read_json(output / "evaluate" / "result.json"),
        training={name: read_json(path) for name, path in trained.items() if path.exists()},
        costs=cost_table(output),
        versions=manifest["versions"],
        hacking=read_json(hacking_path) if hacking_path.exists() else None,
        fusion=read_json(fused / "result.json") if (fused / "result.json").exists() else None,
        fusion_trials=pd.read_csv(fused / "trials.csv") if (fused / "trials.csv").exists() else None,
    )


def _with_metrics(summary: pd.DataFrame) -> pd.DataFrame:
    return summary.assign(**{name: math.nan for name in METRICS if name not in summary})


def cost_table(output: Path) -> pd.DataFrame:
    """One row per stage that has run, indexed by its name, and their `total`; columns as in `Cost`."""
    experiment = load_run(output)
    stages = {
        "quickstart": output / "quickstart",
        **{f"train {name}": experiment.training_of(name) for name in experiment.objectives},
        "search": output / "search",
        "evaluate": output / "evaluate",
        "fuse": output / "fuse",
    }
    costs = {name: Cost(**read_json(path / "cost.json")) for name, path in stages.items() if (path / "cost.json").exists()}
    costs["total"] = sum(costs.values(), Cost())
    return pd.DataFrame([asdict(cost) for cost in costs.values()], index=pd.Index(costs, name="stage"))


def validations(result: Mapping[str, Any]) -> pd.DataFrame:
    """The validations of one policy's training: step, reward, distinct_share, distinct_2, words (step 0 is the base)."""
    columns = ["step", "eval_reward", "eval_distinct_share", "eval_distinct_2", "eval_words"]
    rows = [{name: entry[name] for name in columns} for entry in result["log"] if "eval_reward" in entry]
    return pd.DataFrame(rows).rename(columns=lambda name: name.removeprefix("eval_")).drop_duplicates("step", keep="last")


def paired_difference(completions: pd.DataFrame, one: str, other: str, objectives: list[str]) -> tuple[float, float]:
    """Mean score of system `one` minus that of `other` over the objectives, with its standard error over prompts.

    Both answered the same prompts, so the error of the difference is smaller than the two errors together.
    """
    per_prompt = completions.groupby(["system", "prompt_index"])[objectives].mean()
    difference = (per_prompt.loc[one] - per_prompt.loc[other]).mean(axis=1)
    return float(difference.mean()), float(difference.sem())


def generations(completions: pd.DataFrame, systems: list[str], prompts: int) -> pd.DataFrame:
    """The first sample of the first `prompts` prompts, one column per system, indexed by (prompt_index, prompt)."""
    first = completions[completions["sample"] == completions["sample"].min()]
    table = first.pivot(index=["prompt_index", "prompt"], columns="system", values="completion")
    return table[systems].head(prompts)


def without_nan(value: Any) -> Any:
    """JSON values with null for a number that does not exist."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
