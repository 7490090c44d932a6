"""Fine-tunes a transformers encoder to score a response in its context: a calibrated classifier with one label.

Prompt and response are encoded jointly (`tokenizer(prompt, response)`) and trained with binary cross-entropy against
graded targets in [0, 1]. What is saved is an ordinary hub folder: load it with `AutoModelForSequenceClassification`,
and `sigmoid(logit)` is the score. Platt calibration is folded into the last layer, so that nobody has to know about it.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from reward_models.pair_data import Pair, comparable


@dataclass(frozen=True)
class PairTraining:
    """How to fine-tune: what a training command takes from its user."""

    encoder: str
    output: Path
    seed: int = 0
    epochs: float = 3.0
    batch_size: int = 32
    learning_rate: float = 1.5e-4
    max_length: int = 128
    max_steps: int = -1
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise ValueError(f"--output {self.output} exists and is not an empty folder: name a new one")
        if self.epochs <= 0 or self.batch_size < 1 or self.learning_rate <= 0:
            raise ValueError("epochs, batch size and learning rate must be positive")


class PairClassifier:
    """A trained scorer of responses: `score(prompts, responses)` in [0, 1], higher is better."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length

    @classmethod
    def load(cls, path: str | Path, max_length: int = 128) -> "PairClassifier":
        """From a folder written by `save` or any hub classifier with one label."""
        model = AutoModelForSequenceClassification.from_pretrained(path, use_safetensors=True)
        return cls(model.eval(), AutoTokenizer.from_pretrained(path), max_length)

    def logits(self, prompts: Sequence[str], responses: Sequence[str], batch_size: int = 64) -> Tensor:
        """One logit per pair (N,); pairs of like length share a batch."""
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts for {len(responses)} responses")
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
        result = torch.empty(len(prompts))
        self.model.eval()
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            encoded = encode(self.tokenizer, [prompts[i] for i in rows], [responses[i] for i in rows], self.max_length)
            batch = self.tokenizer.pad(encoded, return_tensors="pt").to(self.model.device)
            with torch.inference_mode():
                result[rows] = self.model(**batch).logits[:, 0].float().cpu()  # (B,)
        return result

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Scores in [0, 1]."""
        return torch.sigmoid(self.logits(prompts, responses)).tolist()

    def save(self, output: Path, card: str, metrics: dict[str, Any]) -> None:
        """Weights (safetensors), tokenizer, model card and measured figures."""
        output.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(output)
        self.tokenizer.model_max_length = self.max_length  # so that `truncation=True` cuts as training did
        self.tokenizer.save_pretrained(output)
        (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        (output / "README.md").write_text(card, encoding="utf-8")


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str], max_length: int) -> Any:
    """Both texts as one input; the longer of the two is cut first."""
    return tokenizer(list(prompts), list(responses), truncation="longest_first", max_length=max_length)


def as_dataset(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Token ids and a (1,)-shaped soft label per pair, the form binary cross-entropy wants."""
    encoded = encode(tokenizer, [pair.prompt for pair in pairs], [pair.response for pair in pairs], max_length)
    return Dataset.from_dict({**encoded, "labels": [[pair.target] for pair in pairs]})


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The last linear layer, whose single output is the logit (`classifier`, `classifier.out_proj`, `score`, …)."""
    heads = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1]
    if not heads:
        raise ValueError(f"{type(model).__name__} has no linear layer with one output to calibrate")
    return heads[-1]


def platt_scale(logits: Tensor, targets: Tensor, steps: int = 50) -> tuple[float, float]:
    """(slope, offset) for which sigmoid(slope * logit + offset) fits the soft targets best (Platt 1999)."""
    log_slope = torch.zeros((), requires_grad=True)  # a log, so that calibration can never turn the order round
    offset = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log_slope, offset], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        scaled = log_slope.exp() * logits + offset
        loss = nn.functional.binary_cross_entropy_with_logits(scaled, targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_slope.exp().item(), offset.item()


def calibrate_head_in_place(classifier: PairClassifier, held_out: Sequence[Pair]) -> dict[str, float]:
    """Folds Platt scaling on `held_out` into the head; returns slope, offset and the cross-entropy before and after."""
    targets = torch.tensor([pair.target for pair in held_out])
    logits = classifier.logits([pair.prompt for pair in held_out], [pair.response for pair in held_out])
    slope, offset = platt_scale(logits, targets)
    head = head_of(classifier.model)
    with torch.no_grad():
        head.weight.mul_(slope)
        if head.bias is None:
            head.bias = nn.Parameter(torch.zeros(1))
        head.bias.mul_(slope).add_(offset)
    cross_entropy = nn.functional.binary_cross_entropy_with_logits
    return {
        "slope": slope,
        "offset": offset,
        "cross_entropy_before": cross_entropy(logits, targets).item(),
        "cross_entropy_after": cross_entropy(slope * logits + offset, targets).item(),
    }


def load_encoder(encoder: str, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The encoder with a fresh one-label head; its word embeddings stay fixed: few examples, and faster."""
    set_seed(seed)
    try:
        # "multi_label" with one label is transformers' name for binary cross-entropy against a soft target.
        config = AutoConfig.from_pretrained(encoder, num_labels=1, problem_type="multi_label_classification")
        model = AutoModelForSequenceClassification.from_pretrained(encoder, config=config, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(encoder)
    except OSError as error:
        raise ValueError(f"--encoder {encoder!r} could not be loaded: {str(error).splitlines()[0]}") from None
    model.get_input_embeddings().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # a third of a CPU's time; early stopping regularises instead
    return model, tokenizer


def train_pair_classifier(training: Sequence[Pair], held_out: Sequence[Pair], settings: PairTraining) -> PairClassifier:
    """Fine-tunes on `training`, stops on the cross-entropy of `held_out`, keeps the best state. Not yet calibrated."""
    shared = {comparable(pair.prompt) for pair in training} & {comparable(pair.prompt) for pair in held_out}
    if shared:
        raise ValueError(f"{len(shared)} prompts are both in training and held out, such as {min(shared)[:60]!r}")
    model, tokenizer = load_encoder(settings.encoder, settings.seed)
    evaluations = max(1, len(training) // settings.batch_size // 2)  # two an epoch
    with tempfile.TemporaryDirectory(prefix="pair_classifier_") as checkpoints:
        arguments = TrainingArguments(
            output_dir=checkpoints,
            num_train_epochs=settings.epochs,
            max_steps=settings.max_steps,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=2 * settings.batch_size,
            learning_rate=settings.learning_rate,
            warmup_steps=0.06,
            weight_decay=0.01,
            lr_scheduler_type="linear",
            train_sampling_strategy="group_by_length",
            bf16=settings.bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=settings.seed,
            eval_strategy="steps",
            eval_steps=evaluations,
            save_strategy="steps",
            save_steps=evaluations,
            save_total_limit=1,
            save_only_model=True,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            logging_steps=max(1, evaluations // 2),
            dataloader_pin_memory=False,
            report_to=[],
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=as_dataset(training, tokenizer, settings.max_length),
            eval_dataset=as_dataset(held_out, tokenizer, settings.max_length),
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
        )
        trainer.train()
    return PairClassifier(model.float().eval(), tokenizer, settings.max_length)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments every reward model's training command shares."""
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the JSON-lines files")
    parser.add_argument(
        "--encoder",
        required=True,
        metavar="PATH_OR_HUB_ID",
        help="any transformers encoder, e.g. roberta-base, answerdotai/ModernBERT-base or the MiniLM folder",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="a new folder for weights, metrics.json and model card",
    )
    parser.add_argument("--seed", type=int, default=0, help="splits, negatives, head and batch order (default 0)")
    parser.add_argument("--epochs", type=float, default=3.0, help="at most this many; stops early (default 3)")
    parser.add_argument("--learning-rate", type=float, default=1.5e-4, help="peak, linear decay (default 1.5e-4)")
    parser.add_argument("--bf16", action="store_true", help="mixed precision: twice as fast on CPUs with AMX and on GPUs")


def training_from(arguments: argparse.Namespace) -> PairTraining:
    """The settings a parsed command line asks for."""
    return PairTraining(
        encoder=arguments.encoder,
        output=arguments.output,
        seed=arguments.seed,
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        bf16=arguments.bf16,
    )
