"""What an adversarial refresh changed, as a Markdown table."""

from collections.abc import Mapping, Sequence
from typing import Any


def refresh_table(rounds: Sequence[Mapping[str, Any]]) -> str:
    """One line per round and figure, before and after; scores of what was found should fall, agreement should not."""
    lines = ["| round | figure | before | after |", "|---|---|---|---|"]
    for number, found in enumerate(rounds, start=1):
        policy = found["policy"]
        lines.append(
            f"| {number} | policy: mean score (base, trained) | {policy['base_reward']:.3f} | {policy['reward']:.3f} |"
        )
        shares = f"{policy['base_distinct_share']:.3f} | {policy['distinct_share']:.3f}"
        lines.append(f"| {number} | policy: distinct completions (base, trained) | {shares} |")
        for part, said in (("added", "outputs, added"), ("held_out", "outputs to validation prompts")):
            for kind, before in found[f"{part}_before"].items():
                after = found[f"{part}_after"][kind]
                lines.append(f"| {number} | mean score of {found[part][kind]} {kind} {said} | {before:.3f} | {after:.3f} |")
        for name, before in found["validation_before"].items():
            lines.append(f"| {number} | validation: {name} | {before:.3f} | {found['validation_after'][name]:.3f} |")
    return "\n".join(lines)
