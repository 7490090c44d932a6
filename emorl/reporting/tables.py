"""Results as tables on the terminal, and as JSON."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from emorl.evaluation.hacking import Attacks
from emorl.reporting.findings import hacking_warnings
from emorl.reporting.results import METRICS, Evaluated, Results, generations, load_run
from emorl.runs.results import BASE, BEST, Kind, SearchResult, TrainingResult, as_json, without_nan

_FILE_WIDTH = 120  # columns where the output is no terminal
_SAMPLE_PROMPTS = 2
_METRICS = {"diversity_2": "div.\n2", "edit_rate": "edit\nrate", "words": "words", "perplexity": "ppl"}  # others: report, JSON


def print_training(results: Mapping[str, TrainingResult]) -> None:
    """How the training of each policy ended: on the validation prompts, the kept checkpoint beside the base."""
    table = borderless_table()
    table.add_column("policy")
    for title in ("steps", "kept\nstep", "reward\nbase", "reward\nkept", "KL to\nbase", "distinct\nbase", "distinct\nkept"):
        table.add_column(title, justify="right", no_wrap=True)
    has_pairs = any(result.pair_accuracy is not None for result in results.values())
    if has_pairs:
        table.add_column("held-out pairs\nin order", justify="right", no_wrap=True)
    table.add_column("why it stopped")
    for name, result in results.items():
        collapsed = " [bold red]collapsed[/]" if result.collapsed else ""
        rewards, shares = (result.base_reward, result.reward), (result.base_distinct_share, result.distinct_share)
        table.add_row(
            escape(name) + collapsed,
            str(result.steps),
            str(result.best_step),
            *(f"{reward:.3f}" for reward in rewards),
            _or_none(result.kl),
            *(f"{share:.2f}" for share in shares),
            *([_or_none(result.pair_accuracy)] if has_pairs else []),
            escape(result.stopped),
        )
    print_whole(wide_console(), "Training, on the validation prompts (reward: higher is better)", table)


def _or_none(number: float | None) -> str:
    return "–" if number is None else f"{number:.3f}"


def print_front(result: SearchResult) -> None:
    """The front of a search, best value first; * marks what the search chose."""
    first = result.best
    title = f"Front of the search ({result.proposer}, {result.trials} trials, value: {result.scalarize})"
    table = borderless_table()
    table.add_column("")
    for policy in first.weights:
        table.add_column(f"weight\n{policy}", justify="right", no_wrap=True)
    for objective in first.scores:
        table.add_column(f"score\n{objective}", justify="right", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    points = sorted(result.front, key=lambda point: -point.value)
    for point in points if first in points else [first, *points]:
        numbers = [*point.weights.values(), *point.scores.values(), point.value]
        style = "bold" if point == first else ""
        table.add_row("*" if point == first else "", *(f"{number:.3f}" for number in numbers), style=style)
    console = wide_console()
    print_whole(console, title, table)
    console.print(
        "* best. These are search scores on the validation prompts, maxima over noisy estimates and so too high;\n"
        "the evaluation (`emorl evaluate`) scores what was chosen again on the test prompts."
    )


def print_evaluation(output: Path) -> None:
    """All systems on the test prompts, hypervolumes, cost and two sample prompts of an evaluated run directory.

    Raises:
        UserError: the evaluation has not finished.
    """
    results = load_run(output)
    evaluated = results.evaluated
    console = wide_console()
    title = f"Evaluation on {evaluated.test_prompts} test prompts (score ± standard error, higher is better)"
    print_whole(console, title, _systems_table(results.objectives, evaluated.summary))
    for line in _notes(evaluated, results.experiment.train.collapse.share):
        console.print(line)
    print_whole(console, "Hypervolume on the test prompts (larger is better)", _hypervolume_table(evaluated.result.hypervolume))
    reference = ", ".join(f"{name} {value:.3f}" for name, value in evaluated.result.reference_point.items())
    console.print(f"reference point {reference}; direction: {evaluated.result.direction}")
    _print_hacking(console, results.attacks)
    print_whole(console, "Cost", _cost_rows(results.costs))
    _print_samples(console, evaluated)


def evaluation_json(output: Path) -> dict[str, Any]:
    """What `print_evaluation` prints, as JSON values; a number that does not exist is null."""
    results = load_run(output)
    evaluated = results.evaluated
    samples = generations(evaluated.completions, _shown(evaluated), _SAMPLE_PROMPTS)
    content = {
        "objectives": results.objectives,
        "test_prompts": evaluated.test_prompts,
        "systems": [_system_json(row, results) for row in evaluated.summary.to_dict("records")],
        "hypervolume": evaluated.result.hypervolume,
        "reference_point": evaluated.result.reference_point,
        "direction": evaluated.result.direction,
        "hacking": None if results.attacks is None else as_json(results.attacks),
        "cost": results.costs.to_dict("index"),
        "samples": [
            {"prompt": prompt, "completions": row.to_dict()}
            for (_, prompt), row in zip(samples.index, _rows(samples), strict=True)
        ],
    }
    return without_nan(content)


def _system_json(row: Mapping[str, Any], results: Results) -> dict[str, Any]:
    weights = {name: row[f"weight_{name}"] for name in results.policies if f"weight_{name}" in row}  # NaN: not a part of it
    return {
        "system": row["system"],
        "kind": row["kind"],
        "weights": {name: weight for name, weight in weights.items() if not math.isnan(weight)},
        "scores": {name: {"mean": row[name], "error": row[f"{name}_error"]} for name in results.objectives},
        **{key: row[key] for key in ("mean", "mean_error", "minimum", "distinct_share", "distinct_2", "words")},
        **{key: row.get(key) for key in METRICS},
        **{key: row[key] for key in ("completions", "tokens", "collapsed", "front")},
    }


def _rows(frame: pd.DataFrame) -> Iterator[pd.Series]:
    return (row for _, row in frame.iterrows())


def _systems_table(objectives: Sequence[str], summary: pd.DataFrame) -> Table:
    table = borderless_table()
    table.add_column("")
    table.add_column("system", min_width=18)
    for name in [*objectives, "mean"]:
        table.add_column(name, justify="right", no_wrap=True)
    shown = {key: title for key, title in _METRICS.items() if key in summary}
    for name in ("min", "dist.\nshare", *shown.values()):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary.to_dict("records"):
        name = escape(row["system"])
        table.add_row(
            "*" if row["front"] else "",
            f"{name} [bold red]collapsed[/]" if row["collapsed"] else name,
            *(f"{row[column]:.3f}±{row[f'{column}_error']:.3f}" for column in [*objectives, "mean"]),
            f"{row['minimum']:.3f}",
            f"[bold red]{row['distinct_share']:.2f}[/]" if row["collapsed"] else f"{row['distinct_share']:.2f}",
            *(f"{row[key]:.{1 if key in ('words', 'perplexity') else 2}f}" for key in shown),
            style="bold" if row["system"] == BEST else "",
        )
    return table


def _notes(evaluated: Evaluated, share: float) -> Iterator[str]:
    yield "* no other system is at least as good in every objective and better in one (of equal systems, the first)"
    if evaluated.collapsed:
        yield (
            f"[bold red]collapsed[/]: under {share:g} of the base's share of distinct completions "
            f"({evaluated.base_distinct_share:.2f}); nearly the same answer to many prompts, whatever its scores"
        )


def _print_hacking(console: Console, hacking: Attacks | None) -> None:
    if hacking is None:
        return
    console.print("\nCan these rewards be hacked?", style="bold")
    for line in hacking_warnings(hacking):
        console.print(f"[bold red]warning[/] {escape(line)}")
    tried = ", ".join(attack.name for attack in hacking.objectives[0].attacks)
    console.print(f"tried: {escape(tried)}; a warned objective pays as much for them as for honest answers (see the report)")


def _hypervolume_table(volumes: Mapping[str, float]) -> Table:
    table = borderless_table()
    table.add_column("what each offers")
    table.add_column("hypervolume", justify="right", no_wrap=True)
    for group, volume in volumes.items():
        table.add_row(group, f"{volume:.4g}")
    return table


def _cost_rows(costs: pd.DataFrame) -> Table:
    table = borderless_table()
    table.add_column("stage")
    for column in costs.columns:
        table.add_column(column.replace("_", "\n"), justify="right", no_wrap=True)
    for stage, cost in zip(costs.index, costs.itertuples(index=False), strict=True):
        numbers = [f"{number:,.0f}" for number in cost]
        table.add_row(stage, *numbers, style="bold" if stage == "total" else "")
    return table


def _shown(evaluated: Evaluated) -> list[str]:
    """Systems whose generations are shown on the terminal: base, each policy, best found."""
    policies = evaluated.summary.loc[evaluated.summary["kind"] == Kind.POLICY, "system"]
    return [BASE, *policies, BEST]


def _print_samples(console: Console, evaluated: Evaluated) -> None:
    samples = generations(evaluated.completions, _shown(evaluated), _SAMPLE_PROMPTS)
    for (index, prompt), row in zip(samples.index, _rows(samples), strict=True):
        table = borderless_table()
        table.add_column("prompt", no_wrap=True)
        table.add_column(escape(prompt), header_style="")
        for system, completion in row.items():
            table.add_row(escape(str(system)), escape(completion))
        print_whole(console, f"Test prompt {index + 1}", table)


def borderless_table() -> Table:
    """Number columns hold no blanks and are `no_wrap`: rich then never breaks or cuts them, see `print_whole`."""
    return Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)


def wide_console(at_least: int = 0) -> Console:
    """Standard output as it is now; wide enough for whole tables where it is a file or a pipe."""
    console = Console(highlight=False, emoji=False)
    console.width = max(at_least, console.width if console.is_terminal else _FILE_WIDTH)
    return console


def print_whole(console: Console, title: str, table: Table) -> None:
    """Prints the table, wider than the terminal rather than with numbers cut off."""
    console.print()
    console.print(title, style="bold")
    needed = Measurement.get(console, console.options.update(width=10_000), table).minimum
    wide_console(needed).print(table)
