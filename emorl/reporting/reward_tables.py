"""What an adversarial refresh changed, as a Markdown table."""

from collections.abc import Sequence

from emorl.runs.results import RefreshRound


def refresh_table(rounds: Sequence[RefreshRound]) -> str:
    """One line per round and figure, before and after; scores of what was found should fall, agreement should not."""
    lines = ["| round | figure | before | after |", "|---|---|---|---|"]
    for number, refreshed in enumerate(rounds, start=1):
        policy = refreshed.policy
        lines.append(
            f"| {number} | policy: mean score (base, trained) | {policy['base_reward']:.3f} | {policy['reward']:.3f} |"
        )
        shares = f"{policy['base_distinct_share']:.3f} | {policy['distinct_share']:.3f}"
        lines.append(f"| {number} | policy: distinct completions (base, trained) | {shares} |")
        for counts, scores, scores_after, outputs in (
            (refreshed.added, refreshed.added_before, refreshed.added_after, "outputs, added"),
            (refreshed.held_out, refreshed.held_out_before, refreshed.held_out_after, "outputs to validation prompts"),
        ):
            for kind, before in scores.items():
                after = scores_after[kind]
                lines.append(f"| {number} | mean score of {counts[kind]} {kind} {outputs} | {before:.3f} | {after:.3f} |")
        for name, before in refreshed.validation_before.items():
            lines.append(f"| {number} | validation: {name} | {before:.3f} | {refreshed.validation_after[name]:.3f} |")
    return "\n".join(lines)
