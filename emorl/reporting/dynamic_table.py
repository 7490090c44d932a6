"""The comparison of a dynamic ensemble as a Markdown table, to be read on the terminal and pasted into a README."""

from emorl.runs.results import DynamicResult, DynamicSystem

_COLUMNS = ("system", "span", "value", "gain on best fixed (95 %)", "mean weights", "tokens/s", "choosing")


def dynamic_table(result: DynamicResult) -> str:
    """One row per system of what `emorl dynamic` found: value ± standard error over prompts, paired gain, mean weights in the
    order of the models, tokens per second, and the share of the time that choosing weights took."""
    fixed = ", ".join(f"{name} {weight:.2f}" for name, weight in result.fixed.weights.items())
    lines = [
        f"{result.prompts} test prompts, {result.device}, {result.threads} threads; best fixed weights: {fixed}",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(_cells(system))} |" for system in result.systems)])


def _cells(system: DynamicSystem) -> list[str]:
    has_agent = system.span is not None
    return [
        system.name,
        str(system.span) if has_agent else "–",
        f"{system.value:.3f}" + ("" if system.error is None else f" ± {system.error:.3f}"),
        f"{system.gain:+.3f} ({system.gain_low:+.3f} to {system.gain_high:+.3f})",
        " ".join(f"{weight:.2f}" for weight in system.mean_weights.values()) or "–",
        f"{system.tokens_per_second:.0f}" if system.tokens else "–",
        f"{system.choosing_share:.1%}" if has_agent else "–",
    ]
