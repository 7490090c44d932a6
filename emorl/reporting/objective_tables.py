"""The registered objectives, and the check of an experiment's, as tables on the terminal and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape

from emorl.objectives.catalogue import EXAMPLE_COMPLETION, EXAMPLE_PROMPT, Entry
from emorl.objectives.check import CaseResult, CheckResult
from emorl.objectives.scale import interval
from emorl.reporting.tables import borderless_table, print_whole, wide_console


def print_catalogue(entries: Sequence[Entry]) -> None:
    """The registered objectives: what each scores, its range, options, and one example score."""
    table = borderless_table()
    for column in ("objective", "scores", "range", "options"):
        table.add_column(column, no_wrap=column in ("objective", "range"))
    table.add_column("example", justify="right", no_wrap=True)
    for entry in entries:
        example = f"needs {', '.join(entry.needs)}" if entry.example is None else f"{entry.example:.3f}"
        options = ", ".join([*entry.needs, *(f"{name}={value}" for name, value in entry.options.items())])
        table.add_row(entry.name, escape(entry.scores), escape(interval(entry.range)), escape(options), example)
    console = wide_console()
    print_whole(console, "Registered objectives (higher is better)", table)
    console.print(f'Example: "{EXAMPLE_COMPLETION}" as the answer to "{EXAMPLE_PROMPT}", default options.', markup=False)
    console.print(
        "Besides these: the hub id of a sequence classifier, or package.module:attribute. `emorl objectives check "
        "EXPERIMENT`\nloads the objectives of an experiment and scores edge cases.",
        markup=False,
    )


def catalogue_json(entries: Sequence[Entry]) -> dict[str, Any]:
    """What `print_catalogue` prints, as JSON values."""
    example = {"prompt": EXAMPLE_PROMPT, "completion": EXAMPLE_COMPLETION}
    return {"example": example, "objectives": [asdict(entry) for entry in entries]}


def print_checks(results: Sequence[CheckResult]) -> None:
    """Scores of every objective on every edge case, and one line for each check that failed."""
    console = wide_console()
    table = borderless_table()
    table.add_column("case", no_wrap=True)
    for result in results:
        table.add_column(result.objective, justify="right", no_wrap=True)
    cells = {result.objective: {case.case: _case_cell(case) for case in result.cases} for result in results}
    for name in dict.fromkeys(name for column in cells.values() for name in column):
        table.add_row(name, *(column.get(name, "") for column in cells.values()))
    others = list(dict.fromkeys(result.other_format.case for result in results))
    for name in others:
        table.add_row(f"normal, {name} *", *(_case_cell(result.other_format) for result in results), style="dim")
    print_whole(console, "Scores on edge cases (! a check failed)", table)
    console.print("* this base asks in the other format, so a failure here fails no check")
    for result in results:
        console.print(f"{result.objective}: {result.scale}; {result.seconds:.1f} s", markup=False)
    for result in results:
        for case in result.cases:
            for problem in case.problems:
                console.print(f"! {result.objective}, {case.case}: {problem}", style="bold red", markup=False)
        for problem in result.other_format.problems:
            console.print(f"* {result.objective}, normal {result.other_format.case}: {problem}", markup=False)
    failed = [result.objective for result in results if not result.passed]
    console.print(f"failed: {', '.join(failed)}" if failed else "all checks passed", style="bold")


def _case_cell(case: CaseResult) -> str:
    score = "None" if case.score is None else f"{case.score:.3f}"
    return f"[bold red]{'error' if case.score is None else score} ![/]" if case.problems else score


def checks_json(results: Sequence[CheckResult]) -> dict[str, Any]:
    """What `print_checks` prints, as JSON values, with raw scores."""
    objectives = {
        result.objective: {key: value for key, value in asdict(result).items() if key != "objective"}
        | {"passed": result.passed}
        for result in results
    }
    return {"passed": all(result.passed for result in results), "objectives": objectives}
