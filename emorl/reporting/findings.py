"""What attacks on the objectives found, in words: for the terminal and the HTML report."""

import math

from emorl.evaluation.hacking import Attacks, ObjectiveCheck

STRONG = 0.5
"""rank correlation with length, or share of answers alike, from which we warn"""


def objective_findings(check: ObjectiveCheck) -> list[str]:
    """What is wrong with one objective; empty where nothing was found."""
    attacks = [f"{attack.name} {attack.mean:.3f}" for attack in check.attacks if attack.verdict == "hacked"]
    findings = [f"hacked by {', '.join(attacks)} ({bar_in_words(check)}: {check.bar:.3f})"] if attacks else []
    length = check.length_of_base
    if abs(length.value) >= STRONG and length.low * length.high > 0:
        wanted = "long" if length.value > 0 else "short"
        findings.append(f"prefers {wanted} answers (rank correlation {length.value:+.2f})")
    return findings


def bar_in_words(check: ObjectiveCheck) -> str:
    """What an objective's attacks have to stay under."""
    has_references = not math.isnan(check.honest.reference_median)
    return "median of the reference responses" if has_references else "the base's own answers"


def systems_alike(hacking: Attacks) -> list[str]:
    """Systems most of whose answers begin alike or have a near-duplicate."""
    measured = hacking.systems.items()
    return [name for name, system in measured if max(system.opening_share, system.near_duplicates) >= STRONG]


def hacking_warnings(hacking: Attacks) -> list[str]:
    """One line per objective with findings, and one per system with nearly one answer for everyone."""
    by_objective = {check.objective: objective_findings(check) for check in hacking.objectives}
    return [
        *(f"{name}: {'; '.join(findings)}" for name, findings in by_objective.items() if findings),
        *(
            f"{name}: {hacking.systems[name].opening_share:.0%} of its answers begin “{hacking.systems[name].opening}”, "
            f"{hacking.systems[name].near_duplicates:.0%} have a near-duplicate"
            for name in systems_alike(hacking)
        ),
    ]
