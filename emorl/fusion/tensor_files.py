"""The safetensors format, tensor by tensor: no two tensors of a file need lie in memory together.

`safetensors` itself writes a file from all of its tensors at once, and keeps a whole file mapped into memory; here each tensor
is mapped, and given back, alone. The format: 8 bytes of header length, a JSON header, the data.
"""

import json
import mmap
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emorl.config import UserError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes, as in safetensors

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies, and what it is."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int
    """bytes"""


def tensor_entries(directory: Path) -> dict[str, TensorEntry]:
    """name -> entry of a checkpoint's safetensors file, or of its shards by their index.

    Raises:
        UserError: no safetensors, a shard that is missing or damaged.
    """
    index = directory / INDEX_NAME
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        entries = {name: entry for file in sorted(set(weight_map.values())) for name, entry in _read_header(directory / file)}
        lost = sorted(set(weight_map) - set(entries))
        if lost:
            raise UserError(f"{directory}: {lost[0]!r} is in the index but in none of the shards; copy the checkpoint again")
        return {name: entries[name] for name in weight_map}
    if not (directory / WEIGHTS_NAME).is_file():
        raise UserError(
            f"{directory} has no {WEIGHTS_NAME}: name the folder of a transformers checkpoint in safetensors (a pickle is "
            "converted by AutoModel….from_pretrained(…).save_pretrained(…))"
        )
    return dict(_read_header(directory / WEIGHTS_NAME))


def _read_header(file: Path) -> Iterable[tuple[str, TensorEntry]]:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = file.stat().st_size
        for name, entry in header.items():
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            if stop > end:
                raise ValueError(f"{name} ends behind the end of the file")
            yield name, TensorEntry(file, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start, stop - start)
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise UserError(f"{file} cannot be read as safetensors ({type(error).__name__}: {error})") from None


def read_tensor(entry: TensorEntry) -> Tensor:
    """Maps a tensor into memory: nothing is copied, and the memory is given back with the tensor. Changing it would not change
    the file."""
    if not entry.size:
        return torch.empty(entry.shape, dtype=entry.dtype)
    before = entry.start % mmap.ALLOCATIONGRANULARITY
    with entry.file.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), before + entry.size, access=mmap.ACCESS_COPY, offset=entry.start - before)
    mapped.madvise(mmap.MADV_WILLNEED)
    return torch.frombuffer(mapped, dtype=torch.uint8, offset=before).view(entry.dtype).view(entry.shape)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """bytes"""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ShardWriter:
    """Writes the tensors of `specs`, in any order and from any thread, into one safetensors file or several of at most
    `shard_size` bytes. They are complete when the `with` block ends well."""

    def __init__(self, directory: Path, specs: Sequence[TensorSpec], shard_size: int) -> None:
        self._directory = directory
        shards = _shards(specs, shard_size)
        files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        self._shards = dict(zip(files if len(shards) > 1 else [WEIGHTS_NAME], shards, strict=True))
        self._streams = {file: (directory / file).open("wb", buffering=0) for file in self._shards}
        self._waiting: dict[str, tuple[TensorSpec, int, int]] = {}  # spec, file descriptor, offset
        for file, shard in self._shards.items():
            offset = self._streams[file].write(_header(shard))
            for spec in shard:
                self._waiting[spec.name] = (spec, self._streams[file].fileno(), offset)
                offset += spec.size

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self._complete()
        for stream in self._streams.values():
            stream.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Each tensor once."""
        spec, descriptor, offset = self._waiting.pop(name)
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), spec
        left = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        while left:  # one call writes at most 2 GiB
            written = os.pwrite(descriptor, left, offset)
            left, offset = left[written:], offset + written

    def _complete(self) -> None:
        """Waits for the disk, and writes the index if there are several shards."""
        assert not self._waiting, next(iter(self._waiting))
        for stream in self._streams.values():
            os.fsync(stream.fileno())
        if len(self._shards) > 1:
            weight_map = {spec.name: file for file, shard in self._shards.items() for spec in shard}
            total = sum(spec.size for shard in self._shards.values() for spec in shard)
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self._directory / INDEX_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shards(specs: Sequence[TensorSpec], shard_size: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.size > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.size
    return shards


def _header(specs: Sequence[TensorSpec]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        entries[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [offset, offset + spec.size]}
        offset += spec.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    return struct.pack("<Q", len(text)) + text
