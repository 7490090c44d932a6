"""A comparison of methods as Markdown tables, to be read on the terminal and pasted into a README."""

from emorl.runs.results import Interval, MethodsResult, Spread

_QUALITY = {
    "diversity_2": ("diversity-2", 2),
    "edit_rate": ("edit rate", 2),
    "distinct_share": ("distinct", 2),
    "words": ("words", 1),
}
_COST = {
    "prompts": "training prompts",
    "converged_prompts": "until converged",
    "all_prompts": "prompts in all",
    "completions": "samples in all",
    "tokens": "tokens in all",
    "seconds": "seconds in all",
    "search_seconds": "of these search",
    "decode_cost": "decode cost",
}


def method_tables(result: MethodsResult) -> str:
    """Scores, differences from the first method with its best rivals, and consumption; mean ± standard deviation over seeds."""
    return "\n\n".join((_scores(result), _differences(result), _consumption(result)))


def _scores(result: MethodsResult) -> str:
    objectives = result.objectives
    names = [*objectives, "mean", "minimum", "hypervolume", "points", *(title for title, _ in _QUALITY.values())]
    lines = [
        f"{result.test_prompts} test prompts, {len(result.seeds)} seeds; mean ± standard deviation over seeds",
        "",
        *_header(["method", *names]),
    ]
    for method, row in result.methods.items():
        cells = [_cell(row[name], 3) for name in (*objectives, "mean", "minimum")]
        cells += [_cell(row["hypervolume"], 5), f"{row['points'].mean:.0f}"]
        cells += [_cell(row[name], digits) for name, (_, digits) in _QUALITY.items()]
        lines.append(f"| {' | '.join([_bold(method, result), *cells])} |")
    reference = ", ".join(f"{name} {value:.3f}" for name, value in result.reference_point.items())
    return "\n".join(
        [
            *lines,
            "",
            f"Hypervolume of all points a method offers, larger is better, and larger by noise for many points; "
            f"reference point {reference}.",
        ]
    )


def _differences(result: MethodsResult) -> str:
    first = result.first
    lines = [
        f"{first} less each other method: difference [95 % interval], share of resamples above 0 "
        "(crossed bootstrap over seeds and prompts, paired)",
        "",
        *_header(["method", "mean", "hypervolume"]),
    ]
    for method, row in result.differences.items():
        cells = [_interval(row["mean"], 3), _interval(row["hypervolume"], 5)]
        lines.append(f"| {' | '.join([method, *cells])} |")
    rivals = {measure: rival or "none, several are equal" for measure, rival in result.best_rival.items()}
    lines += ["", f"Best rival by mean: {rivals['mean']}; by hypervolume: {rivals['hypervolume']}."]
    constant = [name for name in result.objectives if len({row[name].mean for row in result.methods.values()}) == 1]
    if constant:
        lines += ["", f"All methods score alike in {', '.join(constant)}: it says nothing about them."]
    return "\n".join(lines)


def _consumption(result: MethodsResult) -> str:
    lines = [
        "What each method consumed, per seed; `in all` counts validation and search too",
        "",
        *_header(["method", *_COST.values()]),
    ]
    for method, row in result.methods.items():
        cells = [_amount(row[name], 2 if name == "decode_cost" else 0) for name in _COST]
        lines.append(f"| {' | '.join([_bold(method, result), *cells])} |")
    return "\n".join(lines)


def _header(names: list[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _bold(method: str, result: MethodsResult) -> str:
    return f"**{method}**" if method == result.first else method


def _cell(spread: Spread, digits: int) -> str:
    return _amount(spread, digits) + (f" ± {spread.deviation:.{digits}f}" if spread.deviation is not None else "")


def _amount(spread: Spread, digits: int) -> str:
    return "–" if spread.mean is None else f"{spread.mean:,.{digits}f}"


def _interval(gap: Interval, digits: int) -> str:
    return f"{gap.difference:+.{digits}f} [{gap.low:+.{digits}f}, {gap.high:+.{digits}f}], {gap.above:.0%}"
