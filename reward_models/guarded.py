"""A reward model that no fixed sentence can please: a classifier of the form, times how far the words belong to this prompt.

A classifier alone scores form: one generic sentence earns its score under every prompt, and 60 steps of GRPO find it. The
gate is `emorl.objectives.models.similarity.Specificity`, whose mean over prompts is bounded for any one sentence, and the
share of the response that is copied from the prompt, which specificity would reward. Gate and classifier are learned apart: a
cross-encoder trained on few prompts learns form long before it learns who is meant.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from emorl.objectives.models.classifier import Classifier
from emorl.objectives.models.frozen_model import Dtype
from emorl.objectives.models.similarity import Specificity
from emorl.objectives.rules.text import ngrams
from emorl.policies.conversation import completion_text, prompt_text

GATE_FILE, BANK_FILE = "gate.json", "bank.txt"
_COPIED = 4  # words in a row that count as copied; one's own words take up to three from the prompt


@dataclass(frozen=True)
class Gate:
    """How the gate is made; kept beside the classifier's weights."""

    encoder: str
    """folder or hub id of the sentence encoder"""
    temperature: float = 0.05
    slope: float = 1.0
    offset: float = 0.5
    """evidence, in nats, at half open"""
    full_words: int = 12
    """words a prompt needs for the gate to count in full: after "Yeah." anything may follow"""


def save_gate(folder: Path, gate: Gate, bank: Sequence[str]) -> None:
    """Writes the gate and the prompts it compares with into a model's folder."""
    (folder / BANK_FILE).write_text("".join(f"{' '.join(prompt.split())}\n" for prompt in bank), encoding="utf-8")
    (folder / GATE_FILE).write_text(json.dumps(asdict(gate), indent=2) + "\n", encoding="utf-8")


class Guard:
    """Scores in [0, 1]: how far a response's words belong to this prompt and are its own, gate x (1 - copied share).

    Args:
        model: a folder with a gate, as the `train.py` scripts here write.
        bank: a file with one prompt per line instead of the model's own; best are the prompts a policy will be trained on.
        encoder: another place of the gate's encoder than where it was trained.
    """

    range: ClassVar = (0.0, 1.0)

    def __init__(self, model: str, bank: str | None = None, encoder: str | None = None) -> None:
        folder = Path(model)
        if not (folder / GATE_FILE).is_file():
            raise ValueError(f"{folder} holds no gate ({GATE_FILE}); reward_models/README.md says how to train one")
        gate = Gate(**json.loads((folder / GATE_FILE).read_text(encoding="utf-8")))
        self._full_words = gate.full_words
        self._specificity = Specificity(
            encoder or gate.encoder, bank or str(folder / BANK_FILE), gate.temperature, gate.slope, gate.offset
        )

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        asked, said = [prompt_text(prompt) for prompt in prompts], [completion_text(text) for text in completions]
        gates = self._specificity(asked, said)
        return [
            self._partly(prompt, gate) * (1 - copied_share(prompt, response))
            for gate, prompt, response in zip(gates, asked, said, strict=True)
        ]

    def _partly(self, prompt: str, gate: float) -> float:
        """The gate, less of it for a prompt of few words."""
        counts = min(1.0, len(prompt.split()) / self._full_words)
        return 1 - counts * (1 - gate)


class Guarded:
    """Scores in [0, 1]: the classifier's score x what `Guard` says.

    Args:
        model: a folder that a `train.py` here wrote, with a classifier of one output.
        bank, encoder: as in `Guard`.
        dtype: of the classifier, as in `emorl.objectives.Classifier`.
    """

    range: ClassVar = (0.0, 1.0)

    def __init__(self, model: str, bank: str | None = None, encoder: str | None = None, dtype: Dtype = "auto") -> None:
        self._guard = Guard(model, bank, encoder)
        self._classifier = Classifier(model, dtype=dtype)
        self.batch_tolerance = self._classifier.batch_tolerance

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        forms, guards = self._classifier(prompts, completions), self._guard(prompts, completions)
        return [form * guard for form, guard in zip(forms, guards, strict=True)]


def copied_share(prompt: str, response: str) -> float:
    """Share of the response's runs of four words that stand in the prompt; 0 for a shorter response."""
    runs, known = ngrams(response, _COPIED), set(ngrams(prompt, _COPIED))
    return sum(run in known for run in runs) / len(runs) if runs else 0.0
