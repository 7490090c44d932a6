"""Fuses whole checkpoints on disk, tensor by tensor, without loading a model: decoders, T5, BERT classifiers, ViT.

In memory are, for each thread, one tensor of each model and the fused one. The output folder appears when it is complete, with
config, tokenizer and generation config of the base (of the first model without a base).
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emorl.config import UserError
from emorl.fusion.operators import Fusion, check_fusion, fuse_tensor, tensor_workers
from emorl.fusion.tensor_files import ShardWriter, TensorEntry, TensorSpec, read_tensor, tensor_entries
from emorl.runs.layout import ADAPTER
from emorl.runs.progress import Progress, Silent
from emorl.runs.run import read_json, written_whole_directory

_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf"})
_LEFT_BEHIND = frozenset({"README.md", "model.safetensors.index.json", "pytorch_model.bin.index.json", ".gitattributes"})
_TIED = {"lm_head.weight": ("model.embed_tokens.weight", "shared.weight", "transformer.wte.weight"),
         "embed_out.weight": ("gpt_neox.embed_in.weight",)}  # fmt: skip
_SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class Checkpoint:
    """A transformers checkpoint in a folder: its config and its tensors' places."""

    path: Path
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]

    def holds(self, name: str) -> str | None:
        """The name under which a tensor is stored here: its own, that of the embedding it is tied to, or None."""
        if name in self.entries:
            return name
        return next((tied for tied in _TIED.get(name, ()) if tied in self.entries), None) if self._ties else None

    @property
    def _ties(self) -> bool:
        return bool(self.config.get("tie_word_embeddings", True))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in a folder; nothing of its tensors is read yet.

    Raises:
        UserError: no transformers checkpoint in safetensors, an adapter, quantised weights.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is no folder; fetch a model of the hub by `hf download {path} --local-dir FOLDER`, name that")
    if (path / ADAPTER).is_file():
        raise UserError(f"{path} is an adapter, not a whole model; policies are fused by `emorl fuse experiment.yaml`")
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a transformers checkpoint (no config.json in it)")
    config = read_json(path / "config.json")
    if "quantization_config" in config:
        raise UserError(f"{path} holds quantised weights, which cannot be fused; fuse the model it was quantised from")
    return Checkpoint(path, config, tensor_entries(path))


@dataclass(frozen=True)
class FusedTensor:
    """One tensor of the result: how it is fused, and its name in each model and in the base (the same, unless layers
    move)."""

    name: str
    fusion: Fusion
    sources: tuple[str, ...]
    base_source: str


@dataclass(frozen=True)
class CheckpointFusion:
    """What is fused: `models` with weights in this order, the base or None, and the tensors of the result.

    `config_changes` are for the result's config.json (the depth, where layers were left out or repeated).
    """

    models: tuple[Checkpoint, ...]
    base: Checkpoint | None
    tensors: tuple[FusedTensor, ...]
    dtype: torch.dtype | None = None
    """of the result; None: each tensor's own in the base or the first model"""
    seed: int = 0
    config_changes: Mapping[str, Any] = field(default_factory=dict)


def same_tensors(
    models: Sequence[Checkpoint], base: Checkpoint | None, fusion_of: Callable[[str], Fusion]
) -> tuple[FusedTensor, ...]:
    """A plan that fuses every tensor with its namesakes. What `fusion_of` keeps of one model need not be in the others."""
    names = dict.fromkeys(name for model in [*([base] if base else []), *models] for name in model.entries)
    planned = [FusedTensor(name, fusion_of(name), (name,) * len(models), name) for name in names]
    return tuple(tensor for tensor in planned if tensor.fusion.method != "keep" or _kept(tensor, models) is not None)


def _kept(planned: FusedTensor, models: Sequence[Checkpoint]) -> str | None:
    """The stored name of a tensor that is taken from one model; None where that has no such tensor."""
    index = _only(planned.fusion)
    return models[index].holds(planned.sources[index])


def _only(fusion: Fusion) -> int:
    return next(index for index, weight in enumerate(fusion.weights) if weight != 0)


def fuse_checkpoints(what: CheckpointFusion, output: Path, files: Mapping[str, str], progress: Progress | None = None) -> Path:
    """Writes the fused model to `output`, whole or not at all; returns it.

    Args:
        files: name -> text of what is written beside it, such as a model card.

    Raises:
        UserError: tensors or architectures that differ, an output folder that is not empty.
    """
    check_checkpoints(what)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} exists and is not empty; give another output, or move it away")
    specs = [_spec(planned, what) for planned in what.tensors]
    planned_of = {planned.name: planned for planned in what.tensors}
    with written_whole_directory(output) as directory:
        write_checkpoint(
            directory, what.base or what.models[0], specs, lambda spec: _fused(planned_of[spec.name], what),
            dtype=what.dtype, config_changes=what.config_changes, title=f"fuse {output.name}", progress=progress,
        )  # fmt: skip
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8")
    return output


def write_checkpoint(
    directory: Path,
    like: Checkpoint,
    specs: Sequence[TensorSpec],
    tensor_of: Callable[[TensorSpec], Tensor],
    *,
    dtype: torch.dtype | None = None,
    config_changes: Mapping[str, Any] | None = None,
    title: str,
    progress: Progress | None = None,
) -> None:
    """Writes the tensors `specs`, each made when its turn comes, with the config and companions of another checkpoint.

    Args:
        tensor_of: makes a tensor, in any type; called from several threads.
        dtype: for the config, where it is another one than the config says.

    Raises:
        UserError: numbers that are none in the type that they are written in.
    """
    _copy_companions(like.path, directory)
    _write_config({**like.config, **(config_changes or {})}, dtype, directory)
    with (
        (progress or Silent()).bar(title, len(specs)) as bar,
        ShardWriter(directory, specs, _SHARD_SIZE) as writer,
        tensor_workers() as pool,
    ):

        def write_made(spec: TensorSpec) -> str:
            writer.write(spec.name, _finite(tensor_of(spec).to(spec.dtype), spec))
            return spec.name

        for name in pool.map(write_made, specs):
            bar.advance(1, name)


def _finite(fused: Tensor, spec: TensorSpec) -> Tensor:
    """The tensor, if its numbers are some in the type that it is written in."""
    if fused.is_floating_point() and not bool(fused.isfinite().all()):
        raise UserError(
            f"{spec.name!r} would hold NaN or infinity in {str(spec.dtype).removeprefix('torch.')}: a model holds some there, "
            "or numbers beyond what that type can say; look at the models, or give dtype: float32"
        )
    return fused


def check_checkpoints(what: CheckpointFusion) -> None:
    """Refuses models of different architectures, and tensors that are missing or of another shape, naming the first."""
    everyone = [*([what.base] if what.base else []), *what.models]
    for other in everyone[1:]:
        kinds = [model.config.get("model_type") for model in (everyone[0], other)]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"{everyone[0].path} is a {kinds[0]} and {other.path} a {kinds[1]}; fuse models of one architecture"
            )
    for planned in what.tensors:
        check_fusion(planned.fusion, len(what.models), what.base is not None)
        first: tuple[Checkpoint, tuple[int, ...]] | None = None
        for checkpoint, name in _sources(planned, what):
            stored = checkpoint.holds(name)
            if stored is None:
                raise UserError(
                    f"{checkpoint.path} has no tensor {name!r}, others have; fuse models of one architecture, or keep that "
                    "tensor of one model (keep: {" + name.split(".")[0] + ": model})"
                )
            shape = checkpoint.entries[stored].shape
            first = first or (checkpoint, shape)
            if shape != first[1]:
                raise UserError(
                    f"{name!r} is {list(first[1])} in {first[0].path} and {list(shape)} in {checkpoint.path}; fuse models of "
                    "one architecture and vocabulary, or keep that tensor of one model"
                )


def _sources(planned: FusedTensor, what: CheckpointFusion) -> list[tuple[Checkpoint, str]]:
    """The models a tensor is made of, with its name there."""
    if planned.fusion.method == "keep":
        index = _only(planned.fusion)
        return [(what.models[index], planned.sources[index])]
    base = [] if what.base is None else [(what.base, planned.base_source)]
    return [*base, *zip(what.models, planned.sources, strict=True)]


def _spec(planned: FusedTensor, what: CheckpointFusion) -> TensorSpec:
    checkpoint, name = _sources(planned, what)[0]
    stored = checkpoint.holds(name)
    assert stored is not None
    entry = checkpoint.entries[stored]
    changed = what.dtype if what.dtype is not None and entry.dtype.is_floating_point else entry.dtype
    return TensorSpec(planned.name, changed, entry.shape)


def _fused(planned: FusedTensor, what: CheckpointFusion) -> Tensor:
    read = [_read(checkpoint, name) for checkpoint, name in _sources(planned, what)]
    if planned.fusion.method == "keep":
        return read[0]
    if not read[0].is_floating_point():
        if any(not torch.equal(read[0], other) for other in read[1:]):
            raise UserError(f"{planned.name!r} holds whole numbers that differ between the models: there is no mean of them")
        return read[0]
    base, tensors = (None, read) if what.base is None else (read[0], read[1:])
    return fuse_tensor(planned.fusion, tensors, base, name=planned.name, seed=what.seed)


def _read(checkpoint: Checkpoint, name: str) -> Tensor:
    stored = checkpoint.holds(name)
    assert stored is not None
    return read_tensor(checkpoint.entries[stored])


def global_thresholds(
    models: Sequence[Checkpoint], base: Checkpoint, names: Sequence[str], density: Sequence[float]
) -> tuple[float, ...]:
    """TIES' trim over the whole model, as its authors do: the magnitude, per model, that the share `density` of all entries
    of its task vector reaches. Two passes over the tensors, exact to the last entry of float32."""
    return tuple(_global_threshold(model, base, names, share) for model, share in zip(models, density, strict=True))


_BINS = 1 << 15  # of the upper 16 bits of a float32 without its sign: magnitudes in order


def _global_threshold(model: Checkpoint, base: Checkpoint, names: Sequence[str], density: float) -> float:
    if density >= 1:
        return 0.0

    def magnitudes(name: str) -> Tensor:
        delta = _read(model, name).float() - _read(base, name).float()
        return delta.abs_().flatten().view(torch.int32)  # ordered like the numbers

    counts = torch.zeros(_BINS, dtype=torch.int64)
    for name in names:
        counts += torch.bincount(magnitudes(name) >> 16, minlength=_BINS)
    kept = max(1, int(density * int(counts.sum())))
    above = counts.flip(0).cumsum(0).flip(0)  # entries in this bin and higher ones
    chosen = int((above >= kept).nonzero().max())
    inside = torch.cat([bits[bits >> 16 == chosen] for bits in map(magnitudes, names)])
    rank = kept - int(above[chosen] - counts[chosen])  # of the threshold among these, from the largest
    return float(inside.sort(descending=True).values[rank - 1 : rank].view(torch.float32))


def _copy_companions(source: Path, directory: Path) -> None:
    """Tokenizer, templates and whatever else lies beside the weights."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix not in _WEIGHT_SUFFIXES and file.name not in _LEFT_BEHIND:
            shutil.copyfile(file, directory / file.name)


def _write_config(config: Mapping[str, Any], dtype: torch.dtype | None, directory: Path) -> None:
    changed = dict(config)
    if dtype is not None:
        changed.pop("torch_dtype", None)
        changed["dtype"] = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
