"""What objectives that run a model share: loading it, the longest input it can read, length-sorted batches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

DTYPES = ("auto", "float32", "bfloat16")

SPREAD = 1.3  # longest / shortest in a batch: of 256 dialogue turns by 64, a fifth of the tokens is padding instead of 44 %
FIXED = 40  # characters: about what special tokens and a chat template add to every pair
_CHARACTERS = 64 * 1024  # of a batch with its padding: few long texts at once

Pair = tuple[str, str]
S = TypeVar("S")


def score_in_batches(pairs: Sequence[Pair], score: Callable[[Sequence[Pair]], list[S]], batch_size: int) -> list[S]:
    """Scores (prompt, completion) pairs, each distinct pair once, in batches of similar length; in the given order."""
    scores: dict[Pair, S] = {}
    for batch in similar_lengths(set(pairs), batch_size):
        scores.update(zip(batch, score(batch), strict=True))
    return [scores[pair] for pair in pairs]


def similar_lengths(pairs: Iterable[Pair], batch_size: int) -> Iterator[list[Pair]]:
    """Batches of at most `batch_size` pairs, shortest first; a new one also where lengths would differ by `SPREAD`, or the
    batch would be very large."""
    batch: list[Pair] = []
    for pair in sorted(pairs, key=lambda pair: (_size(pair), pair)):
        size = _size(pair)
        if batch and (len(batch) == batch_size or size > SPREAD * _size(batch[0]) or (len(batch) + 1) * size > _CHARACTERS):
            yield batch
            batch = []
        batch.append(pair)
    if batch:
        yield batch


def _size(pair: Pair) -> int:
    return FIXED + len(pair[0]) + len(pair[1])


def load_scorer(kind: Any, model: str, dtype: str) -> Any:
    """A model of the auto class `kind`, from safetensors, to be read and never trained, where it runs fastest."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
    folder = Path(model)
    if not folder.exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise ValueError(f"no folder {model!r}; a hub id has at most one slash")
    if folder.is_dir() and not (folder / "config.json").is_file():
        inside = folder / "model"
        hint = f"; did you mean {str(inside)!r}?" if (inside / "config.json").is_file() else ""
        raise ValueError(f"folder {model!r} holds no model (no config.json){hint}")
    loaded = kind.from_pretrained(model, use_safetensors=True, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)


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
