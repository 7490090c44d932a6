"""What a fusion of policies found, in words: for the terminal and the report."""

from collections.abc import Mapping

from emorl.runs.results import FusionResult


def fusion_lines(result: FusionResult) -> list[str]:
    """A fusion in words."""
    if result.layers:
        lines = [f"{layer}: {column}" for layer, column in result.layers.items()]
    else:
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in result.weights.items())
        settings = "".join(f", {name} {value}" for name, value in result.settings.items())
        lines = [f"{result.method} of {weights}{settings}"]
    if result.proposer is None:
        return lines
    lines += [
        f"best of {result.trials} by {result.proposer}: {_listed(result.scores)}; value {result.value:.3f}",
        "These are search scores on the validation prompts, maxima over noisy estimates and so too high.",
    ]
    if result.holdout:
        holdout = ", ".join(f"{name} {score:.3f} ± {result.holdout_errors[name]:.3f}" for name, score in result.holdout.items())
        lines.append(f"on the validation prompts that no candidate answered: {holdout}")
    return [*lines, f"on the test prompts: {_listed(result.test)}"]


def _listed(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
