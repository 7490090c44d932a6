"""What a reward model is worth: figures on its validation rows, and the model card beside the weights."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from emorl.config.reward import RewardExperiment
from emorl.config.yaml import to_yaml
from emorl.evaluation.agreement import auc, calibration_error, ordered_share, rank_correlation
from emorl.runs.run import write_json, write_text
from emorl.training.reward.data import GradedData

_CARD = """---
base_model: {model}
library_name: transformers
pipeline_tag: text-classification
tags: [reward-model, emorl]
---
# {title}

{description}

Scores are in [0, 1], higher is better, calibrated on the validation rows. Use it as an objective of emorl:

```yaml
{name}: {{function: classifier, model: {folder}{label}}}
```

## Measured on the validation rows

{figures}

The same rows chose the checkpoint and the calibration: on new data expect a little less. Measure what a policy could get
without merit before you train on it (`emorl evaluate` and `emorl report` show attacks, length and near-duplicates).

## Training

{rows} rows to train on, {validation} to validate, {seconds:.0f} s. Settings:

```yaml
{settings}
```
"""


def measure(experiment: RewardExperiment, data: GradedData, scores: Tensor) -> dict[str, float]:
    """Agreement of scores (N, outputs) with the validation rows' labels; what cannot be measured on them is left out."""
    targets = np.array([row.targets for row in data.validation])
    values = scores.numpy()
    figures = {}
    for column, name in enumerate(data.names):
        prefix = f"{name}: " if len(data.names) > 1 else ""
        score, target = values[:, column], targets[:, column]
        present, absent = score[target > 0], score[target == 0]
        if len(present) and len(absent):
            figures[f"{prefix}AUC above the lowest label"] = auc(present, absent)
        figures[f"{prefix}rank correlation"] = rank_correlation(score, target)
        figures[f"{prefix}calibration error"] = calibration_error(score, target)
    if experiment.loss == "classification":
        figures["accuracy"] = float((values.argmax(1) == targets.argmax(1)).mean())
    if experiment.loss == "ranking":
        groups = [row.group for row in data.validation]
        figures["pairs in order, same group"] = ordered_share(values[:, 0], targets[:, 0], groups)
    return {name: value for name, value in figures.items() if not np.isnan(value)}


def figures_table(figures: Mapping[str, float]) -> str:
    """Two Markdown columns: what was measured, and the figure."""
    return "\n".join(["| measured | value |", "|---|---|", *(f"| {name} | {value:.3f} |" for name, value in figures.items())])


def save_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    experiment: RewardExperiment,
    data: GradedData,
    figures: Mapping[str, float],
    seconds: float,
) -> None:
    """Weights, tokenizer, `metrics.json` and the card, whole or not at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    for old in (partial, folder):  # a folder without a finished run is from a kill in the next lines
        shutil.rmtree(old, ignore_errors=True)
    model.save_pretrained(partial, safe_serialization=True)
    tokenizer.save_pretrained(partial)
    write_json(partial / "metrics.json", dict(figures))
    taught = "pairs" if experiment.data.chosen_column is not None else ", ".join(experiment.data.labels)
    card = _CARD.format(
        model=experiment.model,
        title=f"Reward model {experiment.output.name}",
        name=experiment.output.name,
        description=experiment.description or f"Trained with the {experiment.loss} loss on {taught}.",
        folder=folder,
        label=f", label: {data.names[-1]}" if len(data.names) > 1 else "",
        figures=figures_table(figures),
        rows=len(data.training),
        validation=len(data.validation),
        seconds=seconds,
        settings=to_yaml(experiment).strip(),
    )
    write_text(partial / "README.md", card)
    partial.rename(folder)
