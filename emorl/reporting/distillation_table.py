"""What a distilled adapter keeps of the ensemble, as Markdown tables for the terminal and the report."""

from statistics import fmean

from emorl.evaluation.retention import DISTILLED, SOUP, SYSTEMS
from emorl.runs.results import DistillationResult, Retention, TradeOff

_TITLES = {"divergence": "KL from ensemble"}
_COLUMNS = ("weights", "answers by", "value", "scores", "KL from ensemble", "words", "distinct")


def distillation_table(result: DistillationResult) -> str:
    """Every trade-off on the test prompts, and the shares of the ensemble's gain over its soup that are kept."""
    objectives = ", ".join(next(iter(result.trade_offs[0].scores.values()), {}))
    lines = [
        f"{result.steps} steps of {result.answers_per_step} answers, begun as {result.start}; step {result.best_step} was kept",
        f"KL from the ensemble on validation: {result.first_divergence:.2g} nats per token, at last {result.divergence:.2g}",
        f"cut to its rank, what it began as keeps {result.kept_energy:.1%} of its squared norm",
        f"scores: {objectives}; value: their weighted mean; test prompts",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{'---|' * len(_COLUMNS)}",
        *(f"| {' | '.join(_cells(one, system))} |" for one in result.trade_offs for system in SYSTEMS if one.scores),
    ]
    lines += _of_front(result) if result.front else _kept(result)
    return "\n".join(lines)


def _kept(result: DistillationResult) -> list[str]:
    return [
        "",
        "| of the ensemble's gain over its soup | gain (95 %) | share kept (95 %) |",
        "|---|---|---|",
        *(f"| {_TITLES.get(name, name)} | {_gain(kept)} | {_share(kept)} |" for name, kept in result.kept.items()),
    ]


def _of_front(result: DistillationResult) -> list[str]:
    """KL by system, apart for weights that were held out; what is offered; whether it obeys."""
    groups = {"at the front's weights": False, "at held-out weights": True}
    of = {title: [one.divergence for one in result.trade_offs if one.held_out == held] for title, held in groups.items()}
    lines = ["", "| mean KL from the ensemble | one adapter for all | a soup for each |", "|---|---|---|"]
    lines += [
        f"| {title} | {fmean(one[DISTILLED] for one in found):.2g} | {fmean(one[SOUP] for one in found):.2g} |"
        for title, found in of.items()
        if found and found[0]
    ]
    volumes = ", ".join(f"{name} {volume:.4g}" for name, volume in result.hypervolume.items())
    reference = ", ".join(f"{name} {value:.3f}" for name, value in result.reference_point.items())
    followed = ", ".join(f"{name} {correlation:.2f}" for name, correlation in result.follows.items())
    return [
        *lines,
        "",
        f"hypervolume at the front's weights: {volumes}, above {reference}",
        f"scores follow the ensemble's over all weights (correlation; 1: it obeys; 0 or below: it does not read): {followed}",
    ]


def _cells(one: TradeOff, system: str) -> list[str]:
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in one.weights.items())
    return [
        f"{one.name}: {weights}",
        system,
        f"{one.value[system]:.3f}",
        " ".join(f"{score:.3f}" for score in one.scores[system].values()),
        f"{one.divergence[system]:.2g}",
        f"{one.words[system]:.1f}",
        f"{one.distinct_share[system]:.2f}",
    ]


def _gain(kept: Retention) -> str:
    return f"{kept.gain:+.3g} ({kept.gain_low:+.3g} to {kept.gain_high:+.3g})"


def _share(kept: Retention) -> str:
    if kept.share is None or kept.low is None or kept.high is None:
        return "– (ensemble and soup do not differ here)"
    return f"{kept.share:.0%} ({kept.low:.0%} to {kept.high:.0%})"
