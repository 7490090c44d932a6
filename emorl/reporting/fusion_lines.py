"""What a fusion of policies found, in words: for the terminal and the report."""

from collections.abc import Mapping
from typing import Any


def fusion_lines(result: Mapping[str, Any]) -> list[str]:
    """A fusion's `result.json` in words."""
    if "layers" in result:
        lines = [f"{layer}: {column}" for layer, column in result["layers"].items()]
    else:
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in result["weights"].items())
        settings = "".join(f", {name} {value}" for name, value in result.get("settings", {}).items())
        lines = [f"{result['method']} of {weights}{settings}"]
    if "scores" in result:
        scores = ", ".join(f"{name} {score:.3f}" for name, score in result["scores"].items())
        lines += [
            f"best of {result['trials']} by {result['proposer']}: {scores}; value {result['value']:.3f}",
            "These are search scores on the validation prompts, maxima over noisy estimates and so too high.",
        ]
    if "holdout" in result:
        errors = result.get("holdout_errors", {})
        holdout = ", ".join(
            f"{name} {score:.3f}" + (f" ± {errors[name]:.3f}" if errors else "") for name, score in result["holdout"].items()
        )
        lines.append(f"on the validation prompts that no candidate answered: {holdout}")
    if "test" in result:  # not in runs of earlier versions
        lines.append("on the test prompts: " + ", ".join(f"{name} {score:.3f}" for name, score in result["test"].items()))
    return lines
