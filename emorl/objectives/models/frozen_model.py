"""The frozen model that an objective reads with: loading it, how long its input may be, how exact its scores are."""

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from emorl.policies.loading import read_model

Dtype = Literal["auto", "float32", "bfloat16"]


def load_frozen(kind: Any, model: str, dtype: str) -> Any:
    """A model of the auto class `kind`, from safetensors, to be read and never trained, where it runs fastest."""
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype is one of {', '.join(get_args(Dtype))}, got {dtype!r}")
    folder = Path(model)
    if not folder.exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise ValueError(f"no folder {model!r}; a hub id has at most one slash")
    if folder.is_dir() and not (folder / "config.json").is_file():
        inside = folder / "model"
        hint = f"; did you mean {str(inside)!r}?" if (inside / "config.json").is_file() else ""
        raise ValueError(f"folder {model!r} holds no model (no config.json){hint}")
    precision = dtype if dtype == "auto" else getattr(torch, dtype)
    loaded = read_model(
        kind,
        model,
        "model",
        is_new=lambda _, tensor: kind is AutoModel and "pooler." in tensor,  # whose states are averaged: nothing reads it
        dtype=precision,
    )
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu")


def batch_tolerance(model: PreTrainedModel) -> float:
    """How far a score in [0, 1] may move with the batch it is computed in: other kernels, other rounding."""
    return 1e-4 if model.dtype == torch.float32 else 2e-2


def longest_input(model: PreTrainedModel) -> int | None:
    """Tokens of the longest input that a model has positions for; None where positions are not counted."""
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1  # RoBERTa's kind counts from behind the padding index
    return positions
