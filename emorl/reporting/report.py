"""One self-contained HTML page of whatever has run in a directory (`emorl report RUN`).

Plotly's script is inside the page once and nothing is loaded from a network. All text that a model or a user wrote is
escaped by the template.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from emorl.config import UserError
from emorl.config.yaml import to_yaml
from emorl.evaluation.hacking import Attacks
from emorl.reporting import figures
from emorl.reporting.distillation_table import distillation_table
from emorl.reporting.dynamic_table import dynamic_table
from emorl.reporting.findings import objective_findings, systems_alike
from emorl.reporting.fusion_lines import fusion_lines
from emorl.reporting.method_tables import method_tables
from emorl.reporting.results import Results, load_run, paired_difference, validations_table
from emorl.runs.layout import EXPERIMENT, Layout
from emorl.runs.results import BASE, BEST, Kind
from emorl.runs.run import write_text

_TEMPLATE = "report.html"
_ADDED_BY = "emorl {stage} {file}"
_PROMPTS = 12
_CANDIDATES = 10
_TERNARY_POLICIES = 3
_PAIRED_OBJECTIVES = 5
_ROUNDING = 1e-9  # differences below come from floating point
_METRICS = {
    "words_deviation": "± words",
    "repeated_trigrams": "repeated trigrams",
    "diversity_2": "diversity-2",
    "edit_rate": "edit rate",
    "all_above_median": "all above median",
    "perplexity": "perplexity",
    "paper_perplexity": "perplexity (paper)",
}
_IN_WORDS = {"ensemble, equal weights": "equal weights", "parameter average, equal weights": "parameter averaging"}


@dataclass(frozen=True)
class Rival:
    """A system against the best found: its mean score, and best found minus rival, each with its standard error."""

    name: str
    score: float
    error: float
    difference: float
    difference_error: float
    collapsed: bool

    @property
    def verdict(self) -> str:
        """`better`, `worse` (by more than two standard errors of the paired difference), `same` or `undecided`."""
        if max(abs(self.difference), self.difference_error) < _ROUNDING:
            return "same"
        if abs(self.difference) <= 2 * self.difference_error or math.isnan(self.difference_error):
            return "undecided"
        return "better" if self.difference > 0 else "worse"


def write_report(output: Path) -> Path:
    """Writes `report/report.html` into an experiment's output directory, of every stage that has run; returns its path.

    Raises:
        UserError: no run directory, or none of its stages has finished.
    """
    results = load_run(output)
    if not results.ran:
        raise UserError(f"{output} holds no finished stage yet; run `emorl run {Layout(output).experiment}` first")
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template(_TEMPLATE).render(_content(results))
    path = Layout(output).report
    write_text(path, page)
    return path


def _content(results: Results) -> dict[str, Any]:
    search = results.search
    share = results.experiment.train.collapse.share
    return {
        "results": results,
        "objectives": results.objectives,
        "title": f"Trade-offs between {_listed(results.objectives)}",
        "plotly": Markup(get_plotlyjs()),
        "missing": {stage: _ADDED_BY.format(stage=stage, file=results.output / EXPERIMENT) for stage in results.missing},
        "evaluated": None if results.evaluation is None else _evaluation(results),
        "search_mean": None if search is None else sum(search.best.scores.values()) / len(search.best.scores),
        "search_front": [] if search is None else sorted(search.front, key=lambda point: -point.value),
        "costs": results.costs.reset_index().to_dict("records"),
        "config": to_yaml(results.experiment),
        "fusion": [] if results.fusion is None else fusion_lines(results.fusion),
        "candidates": [] if results.fusion_trials is None else _candidate_rows(results.fusion_trials),
        "methods": [] if results.methods is None else _markdown_tables(method_tables(results.methods)),
        "dynamic": [] if results.dynamic is None else _markdown_tables(dynamic_table(results.dynamic)),
        "distilled": [] if results.distilled is None else _markdown_tables(distillation_table(results.distilled)),
        "bad_policies": [name for name, result in results.training.items() if result.collapsed],
        "trace": None if results.trials is None else _embedded(figures.search_trace(results.trials)),
        "training": [
            _embedded(figures.training_figure(validations_table(result), name, result.best_step, share))
            for name, result in results.training.items()
        ],
        **_fronts(results),
    }


def _evaluation(results: Results) -> dict[str, Any]:
    """What the sections on the test prompts show."""
    evaluated = results.evaluated
    against, summary = rivals(results), evaluated.summary
    shown = list(dict.fromkeys([BASE, BEST, *_compared(summary)]))
    systems = summary.fillna({f"weight_{name}": 0.0 for name in results.policies}).to_dict("records")
    return {
        "prompts": evaluated.test_prompts,
        "collapsed": evaluated.collapsed,
        "base_distinct_share": evaluated.base_distinct_share,
        "headline": headline(against[:-1]),
        "rivals": against,
        "best": next(row for row in systems if row["system"] == BEST),
        "systems": systems,
        "weighted": [row for row in systems if row["kind"] in (Kind.ENSEMBLE, Kind.FRONT)],
        "generation_systems": shown,
        "generations": _generation_rows(evaluated.completions, shown),
        "metrics": {key: title for key, title in _METRICS.items() if key in summary},
        "volumes": _embedded(figures.hypervolume_figure(evaluated.result.hypervolume)),
        **_hacking(results.attacks),
    }


def _fronts(results: Results) -> dict[str, Any]:
    """Figures of the search's trials, and of the systems that were compared."""
    trials, objectives, ternary = results.trials, results.objectives, []
    if trials is None:
        return {"fronts": [], "ternaries": []}
    if len(results.policies) == _TERNARY_POLICIES:
        columns = {f"score_{name}": f"{name} over the weights" for name in objectives}
        columns["value"] = "What was searched for"
        ternary = [figures.ternary_figure(trials, results.policies, column, title) for column, title in columns.items()]
    summary = pd.DataFrame(columns=["system", "kind"]) if results.summary is None else results.summary
    if len(objectives) > _PAIRED_OBJECTIVES:
        fronts = [figures.parallel_figure(trials, objectives)]
    else:
        fronts = [figures.front_figure(trials, summary, x, y) for x, y in combinations(objectives, 2)]
    return {"fronts": [_embedded(figure) for figure in fronts], "ternaries": [_embedded(figure) for figure in ternary]}


def _markdown_tables(text: str) -> list[list[list[str]] | str]:
    """The parts of a text with tables: each table as rows of cells, every other line as it is."""
    parts: list[list[list[str]] | str] = []
    for line in filter(None, text.splitlines()):
        cells = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            parts.append(line)
        elif parts and isinstance(parts[-1], list):
            parts[-1] += [] if set(line) <= set("|-") else [cells]
        else:
            parts.append([cells])
    return parts


def _candidate_rows(trials: pd.DataFrame) -> list[dict[str, str]]:
    """The best candidates of a fusion search, best first: which they are, and what they scored."""
    hidden = ("step_", "error_", "prompts", "seconds", "front")
    best = trials.nlargest(_CANDIDATES, "value")
    shown = best[[name for name in best.columns if not name.startswith(hidden)]]
    return [
        {name.replace("_", " ", 1): f"{value:.3f}" if isinstance(value, float) else str(value) for name, value in row.items()}
        for row in shown.to_dict("records")
    ]


def _hacking(attacks: Attacks | None) -> dict[str, Any]:
    """What the section on hacking shows."""
    if attacks is None:
        return {"hacking": None}
    checks = attacks.objectives
    honest = {"the base's answers": "base", "all systems' answers": "outputs", "reference responses": "reference"}
    return {
        "hacking": attacks,
        "findings": {check.objective: objective_findings(check) for check in checks},
        "attacks": list(dict.fromkeys(attack.name for check in checks for attack in check.attacks)),
        "honest": [(label, key) for label, key in honest.items() if not math.isnan(getattr(checks[0].honest, f"{key}_mean"))],
        "alike": systems_alike(attacks),
    }


def rivals(results: Results) -> list[Rival]:
    """The best found against each policy, then equal weights, parameter average and base."""
    evaluated = results.evaluated
    rows = {row["system"]: row for row in evaluated.summary.to_dict("records")}
    names = [name for name in _compared(evaluated.summary) if name not in (BEST, BASE)]
    return [
        Rival(
            name,
            rows[name]["mean"],
            rows[name]["mean_error"],
            *paired_difference(evaluated.completions, BEST, name, results.objectives),
            rows[name]["collapsed"],
        )
        for name in [*names, BASE]
    ]


def headline(against: Sequence[Rival]) -> str:
    """One sentence: how the best found ensemble's mean score compares."""
    phrases = {
        "better": "scores higher than {}",
        "worse": "scores lower than {}",
        "undecided": "cannot be told apart from {}",
        "same": "scores exactly like {}",
    }
    parts = []
    for verdict, phrase in phrases.items():
        names = [_IN_WORDS.get(rival.name, rival.name) for rival in against if rival.verdict == verdict]
        if names:
            parts.append(phrase.format(_listed(names)))
    return f"On average over the objectives the best ensemble found {', and '.join(parts)}."


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _compared(summary: pd.DataFrame) -> list[str]:
    """All systems but the points of the front."""
    return summary.loc[summary["kind"] != Kind.FRONT, "system"].tolist()


def _generation_rows(completions: pd.DataFrame, systems: Sequence[str]) -> list[dict[str, Any]]:
    """Per prompt: its text and, per system, the first completion with its scores."""
    first = completions[(completions["sample"] == completions["sample"].min()) & completions["system"].isin(systems)]
    rows = []
    for index in sorted(first["prompt_index"].unique())[:_PROMPTS]:
        cells = first[first["prompt_index"] == index].set_index("system").loc[list(systems)]
        rows.append({"prompt": cells["prompt"].iloc[0], "cells": cells.to_dict("records")})
    return rows


def _embedded(figure: go.Figure) -> Markup:
    """The figure as a piece of HTML that uses the page's one copy of plotly."""
    config: Mapping[str, Any] = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    height = f"{figure.layout.height}px"
    return Markup(plotly.io.to_html(figure, full_html=False, include_plotlyjs=False, config=config, default_height=height))
